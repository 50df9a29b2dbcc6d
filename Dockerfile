# modelweld in a container: the command, the flows and what they drive, for a non-root user.
#   docker build -t modelweld .                                                             CPU
#   docker build -t modelweld --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .   CUDA
#   docker run --rm -v "$PWD:/project" modelweld merge recipe.yaml merged

FROM python:3.11-slim-bookworm AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/modelweld && /opt/modelweld/bin/pip install --upgrade "pip>=25"
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
# The lock file knows torch by its plain version; the index decides whether that is a CPU or a CUDA build.
RUN /opt/modelweld/bin/pip install --retries 1 --extra-index-url "$TORCH_INDEX" --constraint constraints.txt torch
COPY src ./src
COPY flows ./flows
RUN /opt/modelweld/bin/pip install --constraint constraints.txt ".[all]"

FROM python:3.11-slim-bookworm
RUN apt-get update \
 && apt-get install --yes --no-install-recommends git \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 weld \
 && mkdir /project && chown weld /project
COPY --from=build /opt/modelweld /opt/modelweld
ENV PATH=/opt/modelweld/bin:$PATH \
    DO_NOT_TRACK=1 \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    DVC_NO_ANALYTICS=1 \
    GX_ANALYTICS_ENABLED=false \
    MLFLOW_DISABLE_TELEMETRY=true
USER weld
WORKDIR /project
# A mounted project belongs to the host's user: git must not refuse it.
RUN git config --global --add safe.directory /project
ENTRYPOINT ["modelweld"]
CMD ["--help"]
