"""jebm: distributed training of multi-layer generators with a joint latent-space EBM prior.

    config = jebm.load_config("smoke.yaml", {"train.epochs": 10})
    result = jebm.fit(config, on_report=lambda report: report.metrics["distortion"] < 100)
    images = jebm.from_pretrained("runs/smoke").sample(16)

Each name is imported when it is first used, so that `import jebm` costs nothing. `jebm.train` is a package.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jebm.config import Config
    from jebm.errors import JebmError
    from jebm.parser import load_config, override
    from jebm.pretrained.model import Pretrained, from_pretrained
    from jebm.train.loop import Result
    from jebm.train.recorder import Report
    from jebm.training import fit

__all__ = [
    "Config",
    "JebmError",
    "Pretrained",
    "Report",
    "Result",
    "fit",
    "from_pretrained",
    "load_config",
    "override",
]
__version__ = "0.1.0"

_HOMES = {
    "Config": "jebm.config",
    "JebmError": "jebm.errors",
    "Pretrained": "jebm.pretrained.model",
    "Report": "jebm.train.recorder",
    "Result": "jebm.train.loop",
    "fit": "jebm.training",
    "from_pretrained": "jebm.pretrained.model",
    "load_config": "jebm.parser",
    "override": "jebm.parser",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'jebm' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
