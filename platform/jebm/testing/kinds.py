"""One part under test: how it is built, what goes in, and what has to come out.

Shapes: B batch, C channels, H height, W width, P parameters of a pixel, D width of a code.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from jebm.core.parts import Energy, Generator, Inference, Likelihood, Shapes

__all__ = ["Case", "Kind"]

Kind = Literal["generator", "inference", "energy", "likelihood"]


class _Stub(Generator):
    """The generator of an inference net under test, which most do not use."""

    def forward(self, code_BD: Tensor) -> Tensor:
        return code_BD


@dataclass(frozen=True)
class Case:
    """A class of a kind of part, and what to build it from; can be sent to another process."""

    kind: Kind
    part: type[nn.Module]
    shapes: Shapes
    init_args: Mapping[str, Any]

    def fail(self, what: str) -> NoReturn:
        """Raise the AssertionError that says what is wrong with the class."""
        raise AssertionError(f"{self.part.__name__}: {what}")

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> Any:  # noqa: ANN401  (of any kind)
        """Return a new part whose initial weights depend on the seed, in training mode."""
        leading: Any = self.shapes
        if self.kind == "energy":
            leading = self.shapes.layers
        elif self.kind == "likelihood":
            leading = self.shapes.image[0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.part(leading, **self.init_args).to(dtype)

    def inputs(self, batch: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """Return what `outputs` takes, for a batch; the same numbers in every dtype."""
        noise = torch.Generator().manual_seed(seed)
        width = sum(self.shapes.dims)
        code_BD = torch.randn(batch, width, generator=noise, dtype=torch.float64)
        x_BCHW = torch.rand(batch, *self.shapes.image, generator=noise, dtype=torch.float64) * 1.8 - 0.9
        if self.kind in ("generator", "energy"):
            return [code_BD.to(dtype)]
        if self.kind == "inference":
            return [x_BCHW.to(dtype), code_BD.to(dtype)]
        planes = (self.part_outputs(), *self.shapes.image[1:])
        return [x_BCHW.to(dtype), torch.randn(batch, *planes, generator=noise, dtype=torch.float64).to(dtype)]

    def part_outputs(self) -> int:
        """Return P: the parameters of a pixel that a likelihood under test takes."""
        outputs: int = self.build().outputs
        return outputs

    def outputs(self, part: nn.Module, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return what the part makes of the inputs, by the name of the method or value."""
        if isinstance(part, Generator):
            return {"forward": part(*inputs), "latents": part.latents(*inputs)}
        if isinstance(part, Inference):
            x_BCHW, noise_BD = inputs
            features = part(x_BCHW)
            sample = part.along(features, noise_BD, _Stub(self.shapes))
            named = {"code": sample.code_BD, "mean": sample.mean_BD, "log-variance": sample.log_variance_BD}
            return named | {f"feature {index}": each for index, each in enumerate(features)}
        if isinstance(part, Energy):
            return {"forward": part(*inputs)}
        assert isinstance(part, Likelihood)  # noqa: S101  (the four bases of parts)
        x_BCHW, parameters_BPHW = inputs
        return {"distortion": part.distortion(x_BCHW, parameters_BPHW), "mean": part.mean(parameters_BPHW)}

    def shape_of(self, name: str, batch: int) -> tuple[int, ...] | None:
        """Return the shape that an output must have; None if only its batch matters."""
        width = sum(self.shapes.dims)
        if self.kind == "generator":
            planes = (batch, self.shapes.outputs, *self.shapes.image[1:])
            return planes if name == "forward" else (batch, width)
        if self.kind == "energy":
            return (batch,)
        if self.kind == "likelihood":
            return (batch,) if name == "distortion" else (batch, *self.shapes.image)
        return None if name.startswith("feature") else (batch, width)

    def input_name(self, index: int) -> str:
        """Return the name of an input in an error."""
        names = {"inference": ("images", "noise"), "likelihood": ("images", "parameters"), "energy": ("z",)}
        return names.get(self.kind, ("code",))[index]

    def scalar(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """Return a fixed random combination of all outputs' numbers, averaged over the batch."""
        total = torch.zeros((), dtype=torch.float64)
        for index, tensor in enumerate(outputs.values()):
            noise = torch.Generator().manual_seed(index)
            per_image = math.prod(tensor.shape[1:])
            weights = torch.randn(per_image, generator=noise, dtype=torch.float64)
            total = total + (tensor.double().reshape(len(tensor), -1) * weights).sum(1).mean()
        return total
