"""jebm: distributed training of multi-layer generators with a joint latent-space EBM prior."""

__version__ = "0.1.0"
