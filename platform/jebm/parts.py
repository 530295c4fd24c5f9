"""What a user's own parts derive from, for `from jebm.parts import Energy`: see `jebm.core.parts`."""

from jebm.core.parts import Energy, Features, Generator, Inference, Likelihood, Posterior, Shapes
from jebm.data.source import Reader

__all__ = ["Energy", "Features", "Generator", "Inference", "Likelihood", "Posterior", "Reader", "Shapes"]
