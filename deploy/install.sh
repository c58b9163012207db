#!/bin/sh
# install.sh LOCK-FILE: make .venv hold what LOCK-FILE names, and the command `oshaani`.
#
# Does nothing when .venv already holds it. requirements-dev.lock contains all of
# requirements.lock at the same versions, so `make run` after `make test` installs nothing either.
set -eu
cd "$(dirname "$0")/.."

lock=$1
venv=.venv
stamp=$venv/.installed

fail() {
    echo "oshaani: $1" >&2
    exit 1
}

# What a Python must have, and how fast it is: microseconds for a short loop. Builds of one version differ by a quarter
# (profile-guided optimisation, a shared library), and what a build says of itself does not tell which is faster.
probe='
import ensurepip, sys, timeit, venv
assert sys.version_info >= (3, 11)
class Counter:
    def __init__(self): self.counts = {}
    def count(self, key): self.counts[key] = self.counts.get(key, 0) + 1
def work():
    counter = Counter()
    for number in range(5000): counter.count("%d" % (number & 63))
print(int(min(timeit.repeat(work, number=1, repeat=50)) * 1e6))'

# One line for each Python of this name on the PATH: how fast, and where it is.
probed() {
    IFS=:
    for folder in $PATH; do
        if took=$("$folder/$1" -c "$probe" 2>/dev/null); then
            echo "$took $folder/$1"
        fi
    done
}

find_python() {
    if [ -n "${PYTHON:-}" ] && "$PYTHON" -c "$probe" >/dev/null 2>&1; then
        echo "$PYTHON"
        return
    fi
    for name in python3.11 python3.12 python3.13 python3 python; do
        # In turns, because a busy machine slows whichever is running.
        fastest=$({ probed $name; probed $name; probed $name; } | sort -n | head -n 1)
        if [ -n "$fastest" ]; then
            echo "${fastest#* }"
            return
        fi
    done
    fail "Python 3.11 or newer with its venv module is needed and none was found; install it (Debian, Ubuntu: also
python3-venv), or name it: PYTHON=/path/to/python3.11"
}

# What is installed follows from the lock and from where the repository lies.
state() {
    { pwd; cat "$1"; } | cksum
}

is_installed() {
    [ -x $venv/bin/oshaani ] && $venv/bin/python -c '' 2>/dev/null || return 1
    for candidate in "$lock" requirements-dev.lock; do
        grep -qsxF "$(state "$candidate")" $stamp && return 0
    done
    return 1
}

make_venv() {
    $venv/bin/python -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && return
    python=$(find_python)
    rm -rf $venv
    "$python" -m venv $venv >/dev/null 2>&1 || {
        rm -rf $venv
        fail "'$python -m venv' failed; install the venv module of this Python (Debian, Ubuntu: python3-venv)"
    }
}

# The project runs from this folder: a path file and a two-line command need no build step.
link_project() {
    site=$($venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    pwd >"$site/oshaani.pth"
    cat >$venv/bin/oshaani <<COMMAND
#!/bin/sh
exec "$(pwd)/$venv/bin/python" -P -m oshaani "\$@"
COMMAND
    chmod +x $venv/bin/oshaani
}

is_installed && exit 0
echo "oshaani: installing $lock into $venv (once; the next start installs nothing)" >&2
make_venv
rm -f $stamp
$venv/bin/python -m pip install --disable-pip-version-check --no-input --require-hashes --requirement "$lock" >&2 ||
    fail "the installation failed, see above; run the same command again when the cause is gone"
link_project
state "$lock" >$stamp
