"""What a user's own parts derive from, for `from jebm.parts import Energy`: see `jebm.core.parts`."""

from jebm.core.parts import Energy, Generator, Inference, Likelihood, Posterior, Shapes

__all__ = ["Energy", "Generator", "Inference", "Likelihood", "Posterior", "Shapes"]
