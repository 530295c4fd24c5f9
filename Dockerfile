# The image of a node, of a job, or of one process, with or without GPUs: Ray, jebm's pinned dependencies, and jebm.
#
#   docker build -t jebm .                                                       torch with its own CUDA 13
#   docker build -t jebm --build-arg TORCH_INDEX_URL=<index of CUDA 12 wheels> . for drivers older than 580
#   docker build -t jebm --build-arg TORCH_INDEX_URL=<index of CPU wheels> .     no CUDA: some GB smaller
#   docker build -t jebm-packages --target packages .                            for jobs that bring their code
#   scripts/build-image                                                          without Docker; tests what it built
ARG RAY_VERSION=2.60.0
# Never Ray's -gpu image: torch's wheels bring the CUDA that they were built for, and would not use that of the image.
FROM rayproject/ray:${RAY_VERSION}-py311-cpu AS packages

# Compiles the Langevin chain in C on the first use, and on GPUs the launchers of Triton, which knows no ziglang.
# Ray removes its compiler from its CPU images. No version: a fixed one is soon gone from the distribution's mirrors.
USER 0:0
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

# ray:users. A number, because Kubernetes (runAsNonRoot) cannot tell that a name is not root.
USER 1000:100
WORKDIR /home/ray/jebm

# Before the code, so that a change of the code does not install everything again.
COPY --chown=1000:100 requirements/cluster.txt requirements/
# torch alone is large, and pip's own index offers the build with CUDA on x86-64 (which runs on CPUs too).
# Another index, when named, wins by its local version (2.x.y+cpu).
ARG TORCH_INDEX_URL=""
RUN python -m pip install --no-cache-dir ${TORCH_INDEX_URL:+--extra-index-url "${TORCH_INDEX_URL}"} \
        --requirement requirements/cluster.txt

FROM packages

# What changes least first.
COPY --chown=1000:100 LICENSE ./
COPY --chown=1000:100 cluster/ cluster/
COPY --chown=1000:100 jobs/ jobs/
COPY --chown=1000:100 platform/ platform/

# platform/ is a source root. A job that brings its own working dir sets PYTHONPATH again, and wins.
# No Ray token and no S3 credentials: both come from where the image runs.
ENV PYTHONPATH=/home/ray/jebm/platform \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    RAY_worker_niceness=0

# The image runs as a head, as a worker and as a plain process; no one question fits all three. Who starts it asks:
# KubeRay probes the raylet and the control store by itself, `ray up` restarts nodes without a heartbeat.
HEALTHCHECK NONE

ARG JEBM_VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="jebm" \
      org.opencontainers.image.description="Ray distributed training for hierarchical generators with a joint latent-space energy-based prior" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${JEBM_VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
