"""What every part promises, checked in the order in which a fault would hide the next."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from jebm.core.by_class import BASES
from jebm.core.parts import Energy
from jebm.testing.kinds import Case
from jebm.testing.workers import workers_differ

__all__ = ["check"]

_BATCH = 5
_SHIFT = 1e-6
"""Half the distance of the two points of a finite difference."""


def check(case: Case, special: Callable[[Case], None] | None = None) -> None:
    """Run all checks of one class; `special` is what only its kind promises.

    Raises:
        AssertionError: one line that begins with the class's name.
    """
    if not issubclass(case.part, BASES[case.kind]):
        case.fail(f"does not derive from jebm.parts.{BASES[case.kind].__name__}")
    try:
        for each in (_shapes, _inputs_stay, _repeats, _images_are_independent, _precision, _gradients):
            each(case)
        if special is not None:
            special(case)
        for each in (_weights_are_complete, _resumes, _two_workers):
            each(case)
    except AssertionError:
        raise
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise AssertionError(f"{case.part.__name__}: fails on inputs of float64: {text}") from error


def _shapes(case: Case) -> None:
    for dtype in (torch.float32, torch.float64):
        outputs = case.outputs(case.build(dtype=dtype), case.inputs(_BATCH, dtype=dtype))
        for name, tensor in outputs.items():
            expected = case.shape_of(name, _BATCH) or (_BATCH, *tensor.shape[1:])
            if tuple(tensor.shape) != expected:
                case.fail(f"{name} has shape {list(tensor.shape)}, not {list(expected)}")
            if tensor.dtype != dtype:
                case.fail(f"{name} is {_short(tensor.dtype)} for weights and inputs of {_short(dtype)}")
            if not tensor.isfinite().all():
                case.fail(f"{name} is not finite")


def _inputs_stay(case: Case) -> None:
    part, inputs = case.build(), case.inputs(_BATCH)
    before = [tensor.clone() for tensor in inputs]
    case.outputs(part, inputs)
    for index, (tensor, old) in enumerate(zip(inputs, before, strict=True)):
        if not tensor.equal(old):
            case.fail(f"changes its {case.input_name(index)} in place")


def _repeats(case: Case) -> None:
    part, inputs = case.build(), case.inputs(_BATCH)
    state = {name: tensor.clone() for name, tensor in part.state_dict().items()}
    runs = []
    for seed in (0, 0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            runs.append(case.outputs(part, inputs))
    for name, tensor in part.state_dict().items():
        if not tensor.equal(state[name]):
            case.fail(f"a call changes {name} of its state: outputs would depend on earlier calls")
    for name, tensor in runs[0].items():
        if not tensor.equal(runs[1][name]):
            case.fail(f"{name} differs between two equal calls: it keeps state from call to call")
        if not tensor.equal(runs[2][name]):
            case.fail(f"{name} draws noise of its own: it must be a function of its inputs")


def _images_are_independent(case: Case) -> None:
    part, inputs = case.build(), case.inputs(_BATCH)
    together = case.outputs(part, inputs)
    for index in range(_BATCH):
        alone = case.outputs(part, [tensor[index : index + 1] for tensor in inputs])
        for name, tensor in together.items():
            if not torch.allclose(alone[name], tensor[index : index + 1], rtol=1e-6, atol=1e-9):
                case.fail(f"{name} of an image depends on the others of its batch")


def _precision(case: Case) -> None:
    """Check that nothing on the way is rounded to float32, by changes that float32 cannot hold."""
    part, inputs = case.build(), case.inputs(_BATCH)
    outputs = case.outputs(part, inputs)
    coarse = case.outputs(part, [tensor * 1.01 for tensor in inputs])
    fine = case.outputs(part, [tensor * (1 + 1e-9) for tensor in inputs])
    for name, tensor in outputs.items():
        if tensor.equal(fine[name]) and not tensor.equal(coarse[name]):
            case.fail(f"{name} loses precision: float64 is rounded to a coarser type on the way")


def _gradients(case: Case) -> None:
    """Compare autograd's gradients with finite differences, along one random direction per tensor."""
    part, inputs = case.build(), case.inputs(_BATCH)
    named: dict[str, Tensor] = {f"parameter {name}": p for name, p in part.named_parameters()}
    first = 1 if case.kind == "likelihood" else 0  # images carry no gradient
    named |= {case.input_name(i): inputs[i].requires_grad_() for i in range(first, len(inputs))}
    if case.kind == "likelihood" and len(named) == 1:
        named = {case.input_name(1): inputs[1]}
    value = case.scalar(case.outputs(part, inputs))
    gradients: Sequence[Tensor | None] = [None] * len(named)
    if value.requires_grad:
        gradients = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    noise = torch.Generator().manual_seed(1)
    for (name, tensor), gradient in zip(named.items(), gradients, strict=True):
        direction = torch.randn(tensor.shape, generator=noise, dtype=torch.float64)
        slope = _slope(case, part, inputs, tensor, direction)
        still = abs(slope) <= 1e-7 * (1 + value.abs().item())
        if gradient is None and still and name.startswith("parameter"):
            case.fail(f"{name} has no effect on any output: training on several workers would wait for it")
        if gradient is None and not still:
            case.fail(f"no gradient reaches {name}: is it detached on the way, or used under no_grad?")
        if gradient is None:
            continue
        along = (gradient * direction).sum().item()
        if abs(along - slope) > 1e-3 * max(abs(slope), gradient.norm().item()) + 1e-7 * (
            1 + value.abs().item()
        ):
            case.fail(
                f"the gradient in {name} is {along:.6g} along a line on which outputs change by {slope:.6g}"
            )


@torch.no_grad()
def _slope(case: Case, part: nn.Module, inputs: Sequence[Tensor], tensor: Tensor, direction: Tensor) -> float:
    """Return the derivative of the scalar along a direction of one tensor, by central differences."""
    values = []
    for shift in (_SHIFT, -_SHIFT):
        tensor.add_(direction, alpha=shift)
        values.append(case.scalar(case.outputs(part, inputs)).item())
        tensor.sub_(direction, alpha=shift)
    return (values[0] - values[1]) / (2 * _SHIFT)


def _weights_are_complete(case: Case) -> None:
    part, other, inputs = case.build(0), case.build(1), case.inputs(_BATCH)
    other.load_state_dict(part.state_dict())
    outputs, copied = case.outputs(part, inputs), case.outputs(other, inputs)
    for name, tensor in outputs.items():
        if not tensor.equal(copied[name]):
            case.fail(f"{name} is another one after load_state_dict: some weights are not in state_dict")


def _resumes(case: Case) -> None:
    """Check that training resumes bit for bit from `state_dict` and the optimizer's state."""
    part = case.build(dtype=torch.float32)
    if not list(part.parameters()):
        return
    adam = torch.optim.Adam(part.parameters(), lr=1e-3)
    _train(case, part, adam, range(2))
    saved = copy.deepcopy((part.state_dict(), adam.state_dict()))
    _train(case, part, adam, range(2, 4))
    # The same in a new object.
    again = case.build(1, dtype=torch.float32)
    again.load_state_dict(saved[0])
    its_adam = torch.optim.Adam(again.parameters(), lr=1e-3)
    its_adam.load_state_dict(saved[1])
    _train(case, again, its_adam, range(2, 4))
    for name, tensor in part.state_dict().items():
        if not tensor.equal(again.state_dict()[name]):
            case.fail(f"{name} is another one when training resumes: it depends on state beside state_dict")


def _train(case: Case, part: nn.Module, adam: torch.optim.Adam, steps: range) -> None:
    for step in steps:
        adam.zero_grad()
        loss = case.scalar(case.outputs(part, case.inputs(_BATCH, seed=step, dtype=torch.float32)))
        torch.autograd.backward(loss)
        adam.step()
        if isinstance(part, Energy):
            part.settle()


def _two_workers(case: Case) -> None:
    if message := workers_differ(case):
        case.fail(message)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
