# For a machine with an NVIDIA GPU and its container toolkit. Written from the documentation of its parts; nobody has built it
# yet, so take the first build as its test.
#
#   docker build -t hpd .
#   docker run --rm --gpus all --ipc=host -v "$PWD:/work" hpd train recipe.yaml
ARG TORCH=2.13.0-cuda13.0-cudnn9-runtime
FROM pytorch/pytorch:${TORCH}
# A compiler for torch.compile (impl: compiled).
RUN apt-get update && apt-get install -y --no-install-recommends g++ git && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/hpd
COPY pyproject.toml README.md LICENSE ./
COPY hpd ./hpd
RUN pip install --no-cache-dir ".[serve]"
# The runs, models and data of the user: /work is where the command runs.
WORKDIR /work
ENTRYPOINT ["hpd"]
CMD ["--help"]
