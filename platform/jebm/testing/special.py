"""What only one kind of part promises.

Shapes: B batch, P parameters of a pixel, H height, W width, S width of what f sees, G grid points.
"""

import torch
from torch import Tensor

from jebm.core.parts import by_autograd
from jebm.testing.kinds import Case

__all__ = ["check_closed_form", "check_layers", "check_mass", "check_sample"]

_DRAWS = 16
"""Parameters of a pixel that are tried."""
_GRID = 2001
"""Points of the integral over a pixel's values."""


def check_layers(case: Case) -> None:
    """Check that a generator names its layers, and that they have the code's width."""
    part = case.build()
    try:
        dims = case.shapes._replace(layers=part.layers).dims
    except (AttributeError, TypeError):
        case.fail("layers is no tuple of shapes such as ((2,), (10,)): call super().__init__(shapes)")
    if sum(dims) != sum(case.shapes.dims):
        case.fail(
            f"its layers {part.layers} have {sum(dims)} numbers, not the {sum(case.shapes.dims)} of a code"
        )


def check_sample(case: Case) -> None:
    """Check that a sample is mean + exp(log-variance / 2) noise, so that its rate is that of q."""
    outputs = case.outputs(case.build(), inputs := case.inputs(5))
    drawn = outputs["mean"] + torch.exp(0.5 * outputs["log-variance"]) * inputs[1]
    if not torch.allclose(outputs["code"], drawn, rtol=1e-6, atol=1e-9):
        case.fail("the code is not mean + exp(log-variance / 2) * noise: rates would not be those of q(u|x)")


def check_closed_form(case: Case) -> None:
    """Check an energy's own gradient, and f with constant weights, against autograd."""
    part, (z_BS,) = case.build(), case.inputs(5)
    if not list(part.parameters()):
        case.fail("has no parameters: an energy must have something to learn")
    f_B, expected_BS = by_autograd(lambda z: torch.as_tensor(part(z)), z_BS)
    # Its own gradient first: the default of `frozen` uses it.
    with torch.no_grad():
        gradient_BS = part.gradient(z_BS)
    if gradient_BS is not None:
        _compare(case, "gradient", gradient_BS, expected_BS)
    frozen = part.frozen()
    if not torch.allclose(frozen.f(z_BS).detach(), f_B, rtol=1e-6, atol=1e-9):
        case.fail("frozen().f is another function than forward")
    _compare(case, "frozen().gradient", frozen.gradient(z_BS), expected_BS)
    _compare(case, "frozen().value_and_gradient", frozen.value_and_gradient(z_BS)[1], expected_BS)


def _compare(case: Case, name: str, gradient_BS: Tensor, expected_BS: Tensor) -> None:
    if gradient_BS.shape != expected_BS.shape:
        case.fail(f"{name} has shape {list(gradient_BS.shape)}, not that of z, {list(expected_BS.shape)}")
    if not torch.allclose(gradient_BS, expected_BS, rtol=1e-5, atol=1e-8):
        worst = (gradient_BS - expected_BS).abs().max()
        case.fail(f"{name} is not the gradient of forward: they differ by up to {worst:.3g}")


@torch.no_grad()
def check_mass(case: Case) -> None:
    """Check that a mean is an image, and that a density gives one pixel's values at most all probability."""
    part, (_, parameters_BPHW) = case.build(), case.inputs(_DRAWS)
    largest = part.mean(parameters_BPHW).abs().max()
    if largest > 1:
        case.fail(f"mean lies outside [-1, 1]: up to {largest:.3g}")
    if part.levels_offset == 0 or case.shapes.image[0] != 1:
        return  # a probability of levels, or channels that depend on each other
    x_G111 = torch.linspace(-1, 1, _GRID, dtype=torch.float64).view(-1, 1, 1, 1)
    for parameters_PHW in parameters_BPHW:
        of_pixel = parameters_PHW[None, :, :1, :1].expand(_GRID, -1, -1, -1)
        density_G = torch.exp(-part.distortion(x_G111, of_pixel) - part.constant(1))
        mass = torch.trapezoid(density_G, x_G111.flatten()).item()
        if mass > 1.001:
            case.fail(
                f"p(x|u) of one pixel integrates to {mass:.4g} over [-1, 1], and may not exceed 1: "
                "distortion and constant() together must be -log p in full"
            )
