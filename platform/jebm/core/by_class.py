"""Parts of a model by class: the user's own, named in the config by `class_path` and `init_args`.

What their constructors get first: Generator and Inference the `Shapes`, Energy the shapes of the layers that
it sees, Likelihood the number of image channels, Features an image's shape; after that, their arguments
in the config, by name.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from jebm.classes import built, full_path, loaded, module_of, origin_of
from jebm.config import Config, Part
from jebm.core.parts import Energy, Features, Generator, Inference, Likelihood

__all__ = ["BASES", "FEATURES", "changed_origins", "named_modules", "origins", "own_part"]

BASES: Mapping[str, type[nn.Module]] = {
    "generator": Generator,
    "inference": Inference,
    "energy": Energy,
    "likelihood": Likelihood,
}
"""The class that a part of the model derives from, by the name of its section."""
FEATURES = "evaluation.features"
_ALL: Mapping[str, type[nn.Module]] = {**BASES, FEATURES: Features}


def own_part(config: Config, name: str, leading: tuple[Any, ...], trusted: Collection[str]) -> Any:  # noqa: ANN401
    """Return the part of this section by its class, an object of its base class; None for jebm's own.

    `leading` is what its constructor gets first. Raises ConfigError, one line that names the key, if its
    module is not `trusted` or it cannot be built.
    """
    section = _section(config, name)
    if section.class_path is None:
        return None
    # On the CPU also where jebm's own parts have only shapes: code of others need not know the meta device.
    with torch.device("cpu"):
        kind = loaded(section.class_path, _ALL[name], trusted, f"{name}.class_path")
        return built(kind, leading, section.init_args, f"{name}.init_args")


def named_modules(config: Config, names: Iterable[str] = _ALL) -> tuple[str, ...]:
    """Return the top-level modules of these sections' classes: what the author of the config trusts."""
    paths = {name: _section(config, name).class_path for name in names}
    return tuple(
        sorted({module_of(full_path(path, f"{name}.class_path")) for name, path in paths.items() if path})
    )


def origins(config: Config, trusted: Collection[str], names: Iterable[str] = _ALL) -> dict[str, str]:
    """Return where the classes of these sections come from, for a provenance: {"energy.source_sha256": …}."""
    return {
        f"{name}.{fact}": value
        for name, kind in _classes(config, trusted, names)
        for fact, value in origin_of(kind).items()
    }


def changed_origins(config: Config, trusted: Collection[str], provenance: Mapping[str, str]) -> list[str]:
    """Return the model's classes whose source is not that of the provenance: "energy (mylab.Mine)"."""
    now = origins(config, trusted, BASES)
    return [
        f"{name} ({now[f'{name}.class']})"
        for name in BASES
        if f"{name}.class" in now and now.get(key := f"{name}.source_sha256") != provenance.get(key)
    ]


def _section(config: Config, name: str) -> Part:
    section: Part = attrgetter(name)(config)
    return section


def _classes(
    config: Config, trusted: Collection[str], names: Iterable[str]
) -> Iterator[tuple[str, type[nn.Module]]]:
    """Yield the name and the class of each part by class; raises as `jebm.classes.loaded`."""
    for name in names:
        if path := _section(config, name).class_path:
            yield name, loaded(path, _ALL[name], trusted, f"{name}.class_path")
