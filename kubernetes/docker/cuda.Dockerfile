# atom_cluster for NVIDIA GPUs. Build from the repository's root:
#   docker build -f kubernetes/docker/cuda.Dockerfile -t atom-cluster:cuda .
# The default PyTorch wheels bring CUDA's libraries; the base image adds what they do not: the tools around them. pip takes
# the PyTorch whose Triton is that of the constraints, as kernels were measured with.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

# Triton compiles launchers with a C compiler and Python's headers. NIXL brings its own RDMA libraries, and a second
# libibverbs beside them makes processes end with a segmentation fault: see docs/adding_a_transport.md.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev python3.12-dev python3.12-venv wget \
    && rm -rf /var/lib/apt/lists/* \
    && userdel --remove ubuntu \
    && useradd --create-home --uid 1000 atom
ENV PATH=/opt/venv/bin:$PATH
RUN python3.12 -m venv /opt/venv
WORKDIR /opt/atom_cluster

# Dependencies first: they change less often than the code.
COPY pyproject.toml constraints-dev.txt README.md LICENSE ./
COPY atom_cluster/__init__.py atom_cluster/
RUN pip install --no-cache-dir --constraint constraints-dev.txt --editable '.[cuda,nixl]'
COPY atom_cluster atom_cluster
COPY deployments deployments
COPY configs configs

# Recipes are imported as `deployments.*` by processes that Ray starts anywhere.
ENV PYTHONPATH=/opt/atom_cluster \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    TRITON_CACHE_DIR=/tmp/triton
RUN chmod --recursive a+rX /opt/atom_cluster
USER 1000:1000
CMD ["serve", "run", "configs/llama_8b_unified.yaml"]
