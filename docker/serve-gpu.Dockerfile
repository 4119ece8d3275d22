# syntax=docker/dockerfile:1
# The server on an NVIDIA GPU, CUDA from pip: docker build -f docker/serve-gpu.Dockerfile -t unetpp-server:0.1.0-gpu .
# docker/serve.Dockerfile is the same for CPUs; a test compares them.
FROM python:3.11.16-slim-bookworm AS base

FROM base AS build
COPY constraints.txt /build/
RUN pip install --no-cache-dir --constraint /build/constraints.txt pip

FROM build AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY server server
COPY model model
COPY export export
COPY client client
RUN pip wheel --no-cache-dir --no-deps --build-constraint /build/constraints.txt --wheel-dir /wheels .

FROM build AS packages
COPY docker/cuda.txt /build/
COPY --from=wheel /wheels /wheels
# With traces: --build-arg EXTRAS=gpu,dicom,otel
ARG EXTRAS=gpu,dicom
# The cache is a mount and no part of the image. Bytecode is written of what a start imports, because without it each start takes
# 1.5 s longer; that of all packages would be 100 MB.
# hadolint ignore=DL3042
RUN --mount=type=cache,target=/pip \
    set -- /wheels/*.whl \
    && python -m venv --without-pip /opt/unetpp \
    && pip --python /opt/unetpp/bin/python --cache-dir /pip install --no-compile --constraint /build/constraints.txt --constraint /build/cuda.txt "$1[$EXTRAS]" \
    && /opt/unetpp/bin/python -P -c "import importlib, server.app, server.cli, server.runtime.engines as e; [importlib.import_module(r.module) for r in e.ENGINES.values() if r.installed]"
# Readable by any user, because a checkout may have other modes; tmp is for uploads, which wait on disk.
COPY bundles /bundles
RUN chmod -R a+rX /bundles && mkdir -p /var/lib/unetpp/jobs /var/lib/unetpp/tmp /var/lib/unetpp/tuning

FROM base
ENV PATH=/opt/unetpp/bin:$PATH \
    PYTHONSAFEPATH=1 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    TMPDIR=/var/lib/unetpp/tmp \
    UNETPP_BUNDLES=/bundles \
    UNETPP_JOBS__FOLDER=/var/lib/unetpp/jobs \
    UNETPP_RUNTIME__TUNING_FOLDER=/var/lib/unetpp/tuning \
    UNETPP_HTTP__HOST=0.0.0.0 \
    UNETPP_HTTP__OPS_PORT=9000 \
    UNETPP_LOG__FORMAT=json \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=packages /opt/unetpp /opt/unetpp
COPY --chmod=644 docker/health.py /opt/unetpp/health.py
COPY --from=packages /bundles /bundles
COPY --from=packages --chown=10001:10001 /var/lib/unetpp /var/lib/unetpp
# Writable also where the root is not.
VOLUME /var/lib/unetpp
USER 10001:10001
EXPOSE 8000 9000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "/opt/unetpp/health.py"]
ENTRYPOINT ["unetpp"]
CMD ["serve"]
