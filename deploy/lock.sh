#!/bin/sh
# lock.sh: resolve pyproject.toml into requirements.lock (what runs), requirements-dev.lock (that and the tools) and
# deploy/build.lock (what the wheel is built with), with the hashes of every platform's files and no download address.
# `sh deploy/lock.sh --upgrade` also takes newer versions where the bounds allow.
set -eu
cd "$(dirname "$0")/.."

venv=.venv
[ -x $venv/bin/python ] || sh deploy/install.sh requirements.lock

group() {
    $venv/bin/python -c 'import sys, tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"][sys.argv[1]], sep="\n")' "$1"
}

build_requires() {
    $venv/bin/python -c 'import tomllib
print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")'
}

compile() {
    CUSTOM_COMPILE_COMMAND="make lock" $venv/bin/python -m piptools compile --quiet --generate-hashes \
        --allow-unsafe --strip-extras --annotation-style=line --no-emit-options --no-emit-index-url \
        --no-emit-find-links --no-emit-trusted-host "$@"
}

group lock | $venv/bin/python -m pip install --quiet --disable-pip-version-check --requirement /dev/stdin
compile --output-file=requirements.lock "$@" pyproject.toml
group dev | compile --constraint=requirements.lock --output-file=requirements-dev.lock "$@" pyproject.toml -
build_requires | compile --constraint=requirements-dev.lock --output-file=deploy/build.lock "$@" -

if grep -nE '[a-z]+://' requirements.lock requirements-dev.lock deploy/build.lock; then
    echo "lock.sh: a lock file names a download address" >&2
    exit 1
fi
