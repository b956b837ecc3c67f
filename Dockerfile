# Two images: `service`, the last and so the default, and `train`. Both run as a user of their own and need nothing to
# be writable but /tmp and their volumes.
#
# TORCH=cuda, the default: PyTorch from PyPI, for GPU and CPU alike. Every package has to have its hash in the lock.
# TORCH=cpu: PyTorch's own build for the CPU, without the CUDA libraries. The lock has its version but not its hashes;
#             every other package has to have its own.
ARG TORCH

FROM ghcr.io/astral-sh/uv:0.13.9 AS uv

FROM python:3.13-slim-trixie AS python
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH
RUN --mount=from=uv,source=/uv,target=/bin/uv uv venv --no-cache /opt/venv

FROM python AS packages-cuda
RUN --mount=from=uv,source=/uv,target=/bin/uv \
    --mount=source=requirements/service.txt,target=/tmp/service.txt \
    uv pip install --no-cache --no-build --compile-bytecode --require-hashes --requirements /tmp/service.txt

FROM python AS packages-cpu
RUN --mount=from=uv,source=/uv,target=/bin/uv \
    --mount=source=requirements/service.txt,target=/tmp/service.txt \
    uv pip install --no-cache --no-build --compile-bytecode --no-deps --no-verify-hashes --torch-backend cpu \
        --constraints /tmp/service.txt torch torchvision
RUN --mount=from=uv,source=/uv,target=/bin/uv \
    --mount=source=pyproject.toml,target=/tmp/pyproject.toml \
    --mount=source=requirements/service.txt,target=/tmp/service.txt \
    uv pip install --no-cache --no-build --compile-bytecode \
        --requirements /tmp/pyproject.toml --extra service --constraints /tmp/service.txt

# hadolint ignore=DL3006
FROM packages-${TORCH:-cuda} AS packages

# Our own code, with what names its version. training/ goes aside.
FROM packages AS code
WORKDIR /source
COPY pyproject.toml README.md LICENSE hazelnut.py ./
COPY models models
COPY service service
COPY training training
RUN --mount=from=uv,source=/uv,target=/bin/uv \
    uv pip install --no-cache --no-deps --no-build-isolation --compile-bytecode --target /app . \
    && mv /app/training /training && rm -r /app/bin /app/.lock

FROM packages AS base
LABEL org.opencontainers.image.title="Hazelnut" \
      org.opencontainers.image.description="Finds defects in images of parts, and serves its scores over HTTP." \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
# A new volume takes the owner, and the demo model, from the image.
RUN useradd --uid 10001 --no-create-home --home-dir /tmp hazelnut \
    && install --directory --owner hazelnut --group hazelnut /checkpoints /checkpoints/gears /runs
COPY --chown=hazelnut checkpoints/demo /checkpoints/gears/1
COPY --from=code /app /app
WORKDIR /app
USER 10001
ENV HOME=/tmp
ENTRYPOINT ["python", "-m", "hazelnut"]

FROM base AS train
USER 0
RUN --mount=from=uv,source=/uv,target=/bin/uv \
    --mount=source=pyproject.toml,target=/tmp/pyproject.toml \
    --mount=source=requirements/training.txt,target=/tmp/training.txt \
    uv pip install --no-cache --no-build --compile-bytecode \
        --requirements /tmp/pyproject.toml --extra training --constraints /tmp/training.txt
COPY --from=code /training /app/training
USER 10001
CMD ["--help"]

FROM base AS service
VOLUME ["/checkpoints"]
EXPOSE 8000
ENV HAZELNUT_CHECKPOINT=/checkpoints HAZELNUT_HOST=0.0.0.0 HAZELNUT_PORT=8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health/ready')"]
CMD ["serve"]
