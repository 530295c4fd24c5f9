"""Contract tests of a user's own parts: what training relies on, checked in a few seconds.

    from jebm.testing import check_energy
    check_energy(SumEnergy, width=8)

Each function takes the class and its arguments, builds small ones and raises AssertionError with one line
that says what is wrong: shapes, float64, gradients against finite differences, determinism, independence of
the images of a batch, no hidden state, weights complete in `state_dict`, training that resumes bit for bit,
and two processes that train as one.
"""

from typing import Any

from jebm.core.parts import Energy, Generator, Inference, Likelihood, Shapes
from jebm.testing.battery import check
from jebm.testing.kinds import Case
from jebm.testing.special import check_closed_form, check_layers, check_mass, check_sample

__all__ = ["SHAPES", "Shapes", "check_energy", "check_generator", "check_inference", "check_likelihood"]

SHAPES = Shapes(image=(1, 16, 16), layers=((2,), (3,)), outputs=1)
"""Grey images of 16x16, two layers of vectors: what a part is built for unless the caller says otherwise."""


def check_generator(kind: type[Generator], shapes: Shapes = SHAPES, /, **init_args: Any) -> None:  # noqa: ANN401
    """Check a generator class with these arguments; raises AssertionError, one line."""
    case = Case("generator", kind, shapes, init_args)
    check_layers(case)
    check(case)


def check_inference(kind: type[Inference], shapes: Shapes = SHAPES, /, **init_args: Any) -> None:  # noqa: ANN401
    """Check an inference net's class with these arguments; raises AssertionError, one line."""
    case = Case("inference", kind, shapes, init_args)
    check(case, check_sample)


def check_energy(kind: type[Energy], shapes: Shapes = SHAPES, /, **init_args: Any) -> None:  # noqa: ANN401
    """Check an energy class with these arguments, on all layers of the shapes; raises AssertionError."""
    case = Case("energy", kind, shapes, init_args)
    check(case, check_closed_form)


def check_likelihood(kind: type[Likelihood], shapes: Shapes = SHAPES, /, **init_args: Any) -> None:  # noqa: ANN401
    """Check a likelihood class with these arguments, for the shapes' images; raises AssertionError."""
    case = Case("likelihood", kind, shapes, init_args)
    check(case, check_mass)
