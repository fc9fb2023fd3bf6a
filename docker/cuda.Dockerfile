# The same for NVIDIA GPUs: PyPI's PyTorch brings CUDA's libraries, and torch.compile needs a C compiler.
#   docker build --file docker/cuda.Dockerfile --tag mtrl_vec:cuda .
#   mkdir -p runs
#   docker run --rm --gpus all --shm-size 8g --user "$(id -u):$(id -g)" --volume "$PWD/runs:/work/runs" mtrl_vec:cuda \
#       train --preset gpu
# Nothing has run on a GPU yet; this shows what works:
#   docker run --rm --gpus all --shm-size 8g --user "$(id -u):$(id -g)" --volume "$PWD/runs:/work/runs" \
#       --entrypoint python mtrl_vec:cuda /opt/mtrl_vec/benchmarks/gpu.py
FROM python:3.11-slim

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility,graphics

RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libegl1 libgl1-mesa-dri \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/mtrl_vec
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY mtrl_vec mtrl_vec
COPY benchmarks benchmarks
COPY tests tests
RUN pip install --constraint constraints.txt -e '.[dev]'

# Whoever runs it: a folder to work in and a home for caches that anybody may write to.
RUN mkdir --mode 1777 /work /home/anybody
ENV HOME=/home/anybody
USER 1000
WORKDIR /work
ENTRYPOINT ["mtrl-vec"]
CMD ["doctor"]
