# The image of a node, of a job, or of one process: Ray, jebm's pinned dependencies, and jebm.
#
#   docker build -t jebm .                                                      CPU base
#   docker build -t jebm --build-arg RAY_VARIANT=py311-gpu .                    GPU base
#   docker build -t jebm --build-arg TORCH_INDEX_URL=<index of CPU wheels> .    small: torch without CUDA
ARG RAY_VERSION=2.60.0
ARG RAY_VARIANT=py311-cpu
FROM rayproject/ray:${RAY_VERSION}-${RAY_VARIANT}

# ray:users. A number, because Kubernetes (runAsNonRoot) cannot tell that a name is not root.
USER 1000:100
WORKDIR /home/ray/jebm

# Before the code, so that a change of the code does not install everything again.
COPY --chown=1000:100 requirements/cluster.txt requirements/
# torch alone is large, and pip's own index offers the build with CUDA on x86-64 (which runs on CPUs too).
# An index of CPU wheels, when named, wins by its local version (2.x.y+cpu).
ARG TORCH_INDEX_URL=""
RUN python -m pip install --no-cache-dir ${TORCH_INDEX_URL:+--extra-index-url "${TORCH_INDEX_URL}"} \
        --requirement requirements/cluster.txt

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
