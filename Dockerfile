# The whole experiment in a container, on CPUs: the same lock and the same commands as in a checkout.
#
#   docker build -t stars .
#   mkdir -p out/runs out/figures
#   docker run --rm --user "$(id -u)" -v "$PWD/out/runs:/stars/runs" -v "$PWD/out/figures:/stars/figures" \
#       stars make reproduce
#
# Runs and pictures then lie in out/. Stop it, and the same command goes on where it was.
FROM python:3.11-slim-bookworm

RUN apt-get update \
    && apt-get install -y --no-install-recommends git make \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 stars \
    && install -d -o stars -g stars /stars \
    && git config --system --add safe.directory /stars
USER stars
WORKDIR /stars

# An index with PyTorch's build for CPUs makes the image 4 GB smaller (see the Makefile).
ARG TORCH_INDEX=

# What changes rarely comes first: a change of the code does not install PyTorch again.
COPY --chown=stars Makefile ./
COPY --chown=stars requirements/cpu.lock requirements/
RUN make .venv/.lock TORCH_INDEX="$TORCH_INDEX" && rm -rf ~/.cache

# .git comes along, so that manifests name the commit, whoever runs it.
COPY --chown=stars . .
RUN make setup && install -d -m 777 runs figures

# Any user may run it, so caches lie where any user may write.
ENV PATH=/stars/.venv/bin:$PATH HOME=/tmp
CMD ["stars", "--help"]
