"""Learning rates, averaged weights, clocks."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import tiny_config

from jebm.config import Optimizer
from jebm.store.stream import pieces_of
from jebm.train.metrics import Meter
from jebm.train.runtime import Runtime
from jebm.train.state import Horizon, TrainState, learning_rate

ALONE = Runtime(0, 1, torch.device("cpu"))


def test_learning_rates_follow_their_closed_forms() -> None:
    place = Horizon(steps_per_epoch=10, total_steps=100)
    constant = Optimizer(lr=0.1)
    assert learning_rate(constant, 99, place) == 0.1
    exponential = replace(constant, schedule="exponential", decay_per_epoch=0.5)
    assert [learning_rate(exponential, step, place) for step in (9, 10, 35)] == [0.1, 0.05, 0.0125]
    cosine = replace(constant, schedule="cosine")
    assert learning_rate(cosine, 25, place) == pytest.approx(0.05 * (1 + math.cos(math.pi / 4)))
    assert learning_rate(cosine, 100, place) == pytest.approx(0)
    warm = replace(constant, warmup_steps=4)
    assert [learning_rate(warm, step, place) for step in (0, 1, 3, 4)] == pytest.approx(
        [0.025, 0.05, 0.1, 0.1]
    )


def test_one_adam_step_equals_torchs_own_with_clipping(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    config = replace(
        config,
        optimizer=replace(config.optimizer, energy=Optimizer(lr=0.01, weight_decay=0.1, clip_norm=0.5)),
    )
    player = TrainState.build(config, ALONE).players[1]
    reference = [parameter.detach().clone().requires_grad_() for parameter in player.parameters.values()]
    adam = torch.optim.Adam(reference, lr=0.01, betas=(0.0, 0.9), weight_decay=0.1)
    for mine, theirs in zip(player.parameters.values(), reference, strict=True):
        mine.grad = torch.ones_like(mine)
        theirs.grad = torch.ones_like(theirs)
    count = sum(parameter.numel() for parameter in reference)
    assert float(player.gradient_norm()) == pytest.approx(math.sqrt(count))
    torch.nn.utils.clip_grad_norm_(reference, 0.5)
    player.update(0.01)
    adam.step()
    for mine, theirs in zip(player.parameters.values(), reference, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_averaged_weights_are_the_exponential_mean(tmp_path: Path) -> None:
    state = TrainState.build(tiny_config(tmp_path, train__ema_decay=0.75), ALONE)
    assert state.ema is not None
    parameter, average = next(state.model.parameters()), next(state.ema.parameters())
    start = parameter.detach().clone()
    with torch.no_grad():
        parameter.add_(1)
    state.average()
    torch.testing.assert_close(average, start + 0.25)
    state.average()
    torch.testing.assert_close(average, start + 0.4375)
    assert state.picture_model is state.ema


def test_every_tensor_of_the_state_is_named_once(tmp_path: Path) -> None:
    state = TrainState.build(tiny_config(tmp_path, train__ema_decay=0.9), ALONE)
    tensors = state.tensors()
    assert len({tensor.data_ptr() for tensor in tensors.values()}) == len(tensors)
    parameters = sum(1 for _ in state.model.parameters())
    assert sum(name.endswith(".exp_avg") for name in tensors) == parameters
    assert "model.energy.linears.0.u" in tensors  # singular vectors are part of the state


def test_means_are_over_steps() -> None:
    meter = Meter()
    meter.add({"a": torch.tensor(1.0), "b": torch.tensor([1.0, 2.0])})
    meter.add({"a": torch.tensor(2.0), "b": torch.tensor([3.0, 6.0])})
    assert meter.take(ALONE) == {"a": 1.5, "b/1": 2.0, "b/2": 4.0}
    assert meter.steps == 0


def test_a_metric_that_joins_late_counts_as_zero_before() -> None:
    """As those of an energy that joins in the middle, to the bit as if each were summed by itself."""
    meter = Meter()
    meter.add({"a": torch.tensor(0.1), "b": torch.tensor([1.0, 2.0])})
    for value in (0.2, 0.3):
        meter.add({"b": torch.tensor([3.0, value]), "late": torch.tensor(value), "a": torch.tensor(value)})

    def mean(*values: float) -> float:
        return float(sum(torch.tensor(values).double())) / 3

    assert meter.take(ALONE) == {
        "a": mean(0.1, 0.2, 0.3),
        "b/1": mean(1, 3, 3),
        "b/2": mean(2, 0.2, 0.3),
        "late": mean(0.2, 0.3),
    }
    meter.add({"c": torch.tensor(4.0)})
    assert meter.take(ALONE) == {"c": 4.0}


def test_the_layout_of_the_weights_changes_neither_gradients_nor_checkpoints(tmp_path: Path) -> None:
    """On CUDA they have their channels last."""
    config = tiny_config(tmp_path)
    x = torch.linspace(-1, 1, 4 * 28 * 28).sin().view(4, 1, 28, 28)
    gradients, states = [], []
    for layout in (torch.contiguous_format, torch.channels_last):
        state = TrainState.build(config, ALONE)
        state.model.to(memory_format=layout)
        noise = torch.zeros(4, state.model.latent_dim)
        state.objective(x, noise, noise).loss.backward()
        gradients.append({name: each.grad for name, each in state.model.named_parameters()})
        states.append(state.tensors())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    weight = "model.inference.trunk.0.2.weight"
    assert states[1][weight].stride() != states[0][weight].stride()
    plain, other = (b"".join(pieces_of(each, {})) for each in states)
    assert plain == other


def test_objective_and_power_iterations_are_one_graph() -> None:
    """Nothing in them stops torch from compiling all of it, so nothing would stop a CUDA graph."""
    state = TrainState.build(tiny_config("unused", train__ema_decay=0.9), ALONE)
    x, noise = torch.zeros(4, 1, 28, 28), torch.zeros(4, state.model.latent_dim)
    compiled = torch.compile(state.objective, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, noise, noise).loss, state.objective(x, noise, noise).loss)
    before = state.model.energy.linears[0].u.clone()
    torch.compile(state.model.energy.settle, fullgraph=True, backend="eager")()
    assert not torch.equal(before, state.model.energy.linears[0].u)
