"""The configuration: one tree of frozen dataclasses, on the standard library alone.

Sections check themselves; `Config` checks what concerns two sections. A value that cannot work raises
`ConfigError`, naming the dotted key (`energy.width`). Values come in through `jebm.parser`, nowhere else.
"""

from jebm.config.nets import Energy, Generator, Inference, Langevin, Model, Prior
from jebm.config.roles import RESUME_MAY_CHANGE, SHAPES_RESULT, Role
from jebm.config.run import (
    INCEPTION_FILE,
    Checkpoint,
    Cluster,
    Data,
    Evaluation,
    Features,
    Optimizer,
    Optimizers,
    Run,
    Train,
)
from jebm.config.tree import PLACES, Config, config_to_dict, differing_keys, fields, leaves, role_of

__all__ = [
    "INCEPTION_FILE",
    "PLACES",
    "RESUME_MAY_CHANGE",
    "SHAPES_RESULT",
    "Checkpoint",
    "Cluster",
    "Config",
    "Data",
    "Energy",
    "Evaluation",
    "Features",
    "Generator",
    "Inference",
    "Langevin",
    "Model",
    "Optimizer",
    "Optimizers",
    "Prior",
    "Role",
    "Run",
    "Train",
    "config_to_dict",
    "differing_keys",
    "fields",
    "leaves",
    "role_of",
]
