# syntax=docker/dockerfile:1.7
# One image for every process: `docker build --tag oshaani .`, then `docker run oshaani COMMAND`; docs/how-to/deploy.md.
ARG BASE=python:3.11.14-slim-bookworm

# What it runs on: changes with the lock only. No pip in it, and nothing is compiled.
FROM ${BASE} AS dependencies
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_NO_INPUT=1
WORKDIR /build
COPY requirements.lock ./
RUN python -m venv --without-pip /opt/oshaani
RUN python -m pip --python /opt/oshaani/bin/python install --require-hashes --only-binary :all: --requirement requirements.lock
# The program lies beside it, in a layer of its own.
RUN echo /opt/app > "$(/opt/oshaani/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/app.pth"

FROM dependencies AS program
COPY deploy/build.lock deploy/
RUN python -m pip install --require-hashes --only-binary :all: --requirement deploy/build.lock
COPY . .
RUN python -m pip wheel --no-deps --no-build-isolation --wheel-dir /opt/wheel .
RUN python -m pip --python /opt/oshaani/bin/python install --no-deps --no-index --find-links /opt/wheel --target /opt/app oshaani

FROM ${BASE}
LABEL org.opencontainers.image.title="Oshaani" \
      org.opencontainers.image.description="AI agents on an event log: event-sourced, CQRS, Kafka." \
      org.opencontainers.image.licenses="Apache-2.0"
# All that is written goes to /var/lib/oshaani (a volume) and /tmp, so that the rest may be read-only.
RUN groupadd --gid 10001 oshaani \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /var/lib/oshaani --shell /usr/sbin/nologin oshaani \
    && install --directory --owner=oshaani --group=oshaani --mode=0755 /var/lib/oshaani
COPY --from=dependencies /opt/oshaani /opt/oshaani
COPY --from=program /opt/app /opt/app
COPY --chmod=0555 deploy/image/ /usr/local/bin/
ENV HOME=/var/lib/oshaani \
    OSHAANI_DATA_DIR=/var/lib/oshaani \
    OSHAANI_HOST=0.0.0.0 \
    OSHAANI_PORT=8080 \
    OSHAANI_WORKER_HOST=0.0.0.0 \
    OSHAANI_WORKER_PORT=9464 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /var/lib/oshaani
EXPOSE 8080 9464
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=3 CMD ["healthcheck"]
ENTRYPOINT ["oshaani"]
CMD ["up"]
