# atom_cluster for AMD Instinct GPUs, with AITER and MORI. Build from the repository's root:
#   docker build -f kubernetes/docker/rocm.Dockerfile -t atom-cluster:rocm .
# The base image has ROCm, its compiler (AITER builds its kernels when they are first used) and PyTorch for it. MORI's wheels
# are for Python 3.12 on Ubuntu 24.04 and ROCm 7.2.
FROM rocm/pytorch:rocm7.2_ubuntu24.04_py3.12_pytorch_release_2.9.1

USER 0:0
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libgrpc++1.51t64 libibverbs1 libpci3 libprotobuf32t64 wget \
    && rm -rf /var/lib/apt/lists/* \
    && (id --user --name 1000 || useradd --create-home --uid 1000 atom)
WORKDIR /opt/atom_cluster

# PyTorch and Triton stay those of the base image: a constraint on them would bring the builds for CUDA.
COPY pyproject.toml constraints-dev.txt README.md LICENSE ./
COPY atom_cluster/__init__.py atom_cluster/
# Their versions, not what `pip freeze` says: that names files from which they were installed, which are gone.
RUN pip list --format freeze | grep --extended-regexp '^(torch|triton|pytorch-triton-rocm)==' > /tmp/base.txt \
    && grep --invert-match --extended-regexp '^(torch|triton|nvidia-)' constraints-dev.txt > /tmp/constraints.txt \
    && cat /tmp/base.txt >> /tmp/constraints.txt \
    && pip install --no-cache-dir --constraint /tmp/constraints.txt --editable '.[rocm]'
COPY atom_cluster atom_cluster
COPY deployments deployments
COPY configs configs

# Recipes are imported as `deployments.*` by processes that Ray starts anywhere. AITER keeps the kernels that it builds.
ENV PYTHONPATH=/opt/atom_cluster \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    TRITON_CACHE_DIR=/tmp/triton \
    AITER_JIT_DIR=/tmp/aiter
RUN chmod --recursive a+rX /opt/atom_cluster
USER 1000:1000
CMD ["serve", "run", "configs/llama_8b_unified.yaml"]
