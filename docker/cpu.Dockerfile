# Training and evaluation on CPUs, and everything that draws.
#   docker build --file docker/cpu.Dockerfile --tag mtrl_vec .
#   mkdir -p runs
#   docker run --rm --shm-size 2g --user "$(id -u):$(id -g)" --volume "$PWD/runs:/work/runs" mtrl_vec train --tasks MT10
# PyPI's PyTorch comes with CUDA, which is not needed here. With PyTorch's index of CPU builds the image is a quarter of the size:
#   docker build --build-arg PIP_EXTRA_INDEX_URL=<that index> ...
FROM python:3.11-slim

ARG PIP_EXTRA_INDEX_URL=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

RUN apt-get update \
    && apt-get install --yes --no-install-recommends libegl1 libgl1-mesa-dri \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/mtrl_vec
COPY constraints.txt pyproject.toml README.md LICENSE ./
COPY mtrl_vec mtrl_vec
RUN pip install --constraint constraints.txt '.[pictures,export,hub,dataset]'

# Whoever runs it: a folder to work in and a home for caches that anybody may write to.
RUN mkdir --mode 1777 /work /home/anybody
ENV HOME=/home/anybody
USER 1000
WORKDIR /work
ENTRYPOINT ["mtrl-vec"]
CMD ["doctor"]
