# docker build --target cpu|cuda .   (docs/cluster.md). PIP_FLAGS goes to pip: CONTRIBUTING.md says where torch's CPU build is.
FROM python:3.12-slim AS base
ARG PIP_FLAGS=""
# PYTHONNOUSERSITE: under Apptainer the packages in the home of the user would go before those of the image.
ENV PYTHONUNBUFFERED=1 PYTHONNOUSERSITE=1 PIP_NO_CACHE_DIR=1 HOME=/tmp
WORKDIR /copedit
COPY setup.py pyproject.toml constraints.txt README.md LICENSE ./
COPY kernels kernels
COPY copedit_rt copedit_rt
COPY training training
COPY bench bench
ENTRYPOINT ["copedit"]

FROM base AS cpu
RUN pip install -c constraints.txt $PIP_FLAGS ".[torch,serve,export,fast,dicom]"
USER 1000

# torch's CUDA build brings CUDA's libraries; Triton compiles its launcher at run time and needs a C compiler.
FROM base AS cuda
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN pip install -c constraints.txt $PIP_FLAGS ".[torch,serve,export,fast,dicom]"
USER 1000
