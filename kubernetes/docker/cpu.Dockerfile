# atom_cluster on CPUs, with the demo model. Build from the repository's root:
#   docker build -f kubernetes/docker/cpu.Dockerfile --build-arg TORCH_INDEX=<PyTorch's index of CPU wheels> -t atom-cluster:cpu .
# Without TORCH_INDEX pip installs the CUDA build of PyTorch, which works as well and is some GB larger.
FROM python:3.12.11-slim-bookworm

ARG TORCH_INDEX=""
# A C++ compiler for PyTorch's compiled CPU ops; wget is what KubeRay's own probes use.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ wget \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 atom
WORKDIR /opt/atom_cluster

# Dependencies first: they change less often than the code.
COPY pyproject.toml constraints-dev.txt README.md LICENSE ./
COPY atom_cluster/__init__.py atom_cluster/
RUN pip install --no-cache-dir --constraint constraints-dev.txt \
        ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} --editable .
COPY atom_cluster atom_cluster
COPY deployments deployments
COPY configs configs

# Recipes are imported as `deployments.*` by processes that Ray starts anywhere.
ENV PYTHONPATH=/opt/atom_cluster \
    PYTHONUNBUFFERED=1 \
    OMP_NUM_THREADS=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    ATOM_CLUSTER_CACHE=/opt/atom_cluster/models
RUN atom-cluster get-demo-model && chmod --recursive a+rX /opt/atom_cluster
USER 1000:1000
CMD ["serve", "run", "configs/smollm2_cpu.yaml"]
