"""The contract tests find planted faults, each with a line of its own, and pass parts without faults."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jebm.config import Energy as EnergyConfig
from jebm.config import Generator as GeneratorConfig
from jebm.config import Inference as InferenceConfig
from jebm.config import Likelihood as LikelihoodConfig
from jebm.core.energy import EnergyNet
from jebm.core.generator import GeneratorNet
from jebm.core.inference import InferenceNet
from jebm.core.likelihood import Bernoulli, Gaussian
from jebm.parts import Energy, Generator, Inference, Likelihood, Shapes
from jebm.testing import battery, check_energy, check_generator, check_inference, check_likelihood


class Sum(Energy):
    """Without a fault, with a closed-form gradient."""

    def __init__(self, layers: tuple[tuple[int, ...], ...], width: int = 6) -> None:
        super().__init__(layers)
        self.a = nn.Linear(sum(self.widths), width)
        self.b = nn.Linear(width, 1)

    def forward(self, z: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(z))).squeeze(1)

    def gradient(self, z: Tensor) -> Tensor | None:
        h = torch.tanh(self.a(z))
        return ((1 - h.square()) * self.b.weight) @ self.a.weight


class Decoder(Generator):
    def __init__(self, shapes: Shapes, width: int = 6) -> None:
        super().__init__(shapes)
        planes = (shapes.outputs, *shapes.image[1:])
        self.a = nn.Linear(sum(shapes.dims), width)
        self.b = nn.Sequential(nn.Linear(width, torch.Size(planes).numel()), nn.Unflatten(1, planes))

    def forward(self, code: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(code)))


class Encoder(Inference):
    def __init__(self, shapes: Shapes) -> None:
        super().__init__(shapes)
        self.net = nn.Sequential(
            nn.Flatten(), nn.Linear(torch.Size(shapes.image).numel(), 2 * sum(shapes.dims))
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.net(x).chunk(2, 1)


class Laplace(Likelihood):
    """exp(-|x - mean| / b) / 2b, with one learned b."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.log_b = nn.Parameter(torch.zeros(()))

    def distortion(self, x: Tensor, parameters: Tensor) -> Tensor:
        error = (x - self.mean(parameters)).abs() / self.log_b.exp()
        return (error + self.log_b).sum(dim=(1, 2, 3))

    def mean(self, parameters: Tensor) -> Tensor:
        return torch.tanh(parameters)

    def constant(self, pixels: int) -> float:
        return pixels * float(torch.log(torch.tensor(2.0)))


def with_config(kind: Any, config: Any) -> Any:
    """The class with its config filled in, which a user's own class takes as plain arguments."""

    class Built(kind):
        def __init__(self, leading: Any) -> None:
            if kind is EnergyNet:
                leading = sum(shape[0] for shape in leading)
            super().__init__(config, leading) if kind is Gaussian else super().__init__(leading, config)

    return Built


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the second process, which costs seconds."""
    monkeypatch.setattr(battery, "workers_differ", lambda case: None)


# ── Faults ──────────────────────────────────────────────────────────────────────────────────────────────


class WrongShape(Sum):
    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z).unsqueeze(1)


class HiddenState(Sum):
    calls = 0

    def forward(self, z: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(z) * self.calls


class RunningMean(Sum):
    def __init__(self, layers: Any) -> None:
        super().__init__(layers)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, z: Tensor) -> Tensor:
        self.seen += 1
        return super().forward(z)


class BatchLeak(Sum):
    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z - z.mean(0))


class OwnNoise(Sum):
    def forward(self, z: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(z, 0.5))


class WrongClosedForm(Sum):
    def gradient(self, z: Tensor) -> Tensor | None:
        return -super().gradient(z)


class LosesPrecision(Sum):
    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z.float().to(z.dtype))


class Float32Only(Sum):
    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z).float()


class NoGradient(Sum):
    def forward(self, z: Tensor) -> Tensor:
        with torch.no_grad():
            h = torch.tanh(self.a(z))
        return self.b(h).squeeze(1)

    def gradient(self, z: Tensor) -> Tensor | None:
        return None


class Unused(Sum):
    def __init__(self, layers: Any) -> None:
        super().__init__(layers)
        self.spare = nn.Parameter(torch.zeros(3))


class NotRegistered(Sum):
    def __init__(self, layers: Any) -> None:
        super().__init__(layers)
        self.hidden = [torch.randn(sum(self.widths))]

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(z) + z @ self.hidden[0].to(z)

    def gradient(self, z: Tensor) -> Tensor | None:
        return None


class InPlace(Decoder):
    def forward(self, code: Tensor) -> Tensor:
        return super().forward(code.clamp_(-1, 1))


class Straight(Decoder):
    def forward(self, code: Tensor) -> Tensor:
        return super().forward(code + (code.sin() - code).detach())


class OtherLayers(Decoder):
    def __init__(self, shapes: Shapes) -> None:
        super().__init__(shapes)
        self.layers = ((7,),)


class WrongScale(Encoder):
    def along(self, features: Any, noise: Tensor, generator: Any) -> Any:
        mean, log_variance = features
        sample = super().along(features, noise, generator)
        return sample._replace(code_BD=mean + torch.exp(log_variance) * noise)


class LooseMass(Laplace):
    def constant(self, pixels: int) -> float:
        return 0.0


class StateInTraining(Sum):
    """Forgets at a resume how often its weights have settled."""

    settled = 0

    def settle(self) -> None:
        self.settled += 1
        with torch.no_grad():
            self.a.bias.mul_(1 + 0.01 * self.settled)


@pytest.mark.parametrize(
    ("check", "kind", "line"),
    [
        (check_energy, WrongShape, "forward has shape [5, 1], not [5]"),
        (check_energy, HiddenState, "forward differs between two equal calls: it keeps state"),
        (check_energy, RunningMean, "a call changes seen of its state"),
        (check_energy, BatchLeak, "forward of an image depends on the others of its batch"),
        (check_energy, OwnNoise, "forward draws noise of its own"),
        (check_energy, WrongClosedForm, "gradient is not the gradient of forward: they differ by up to"),
        (check_energy, LosesPrecision, "forward loses precision: float64 is rounded to a coarser type"),
        (check_energy, Float32Only, "forward is float32 for weights and inputs of float64"),
        (check_energy, NoGradient, "no gradient reaches"),
        (check_energy, Unused, "parameter spare has no effect on any output"),
        (
            check_energy,
            NotRegistered,
            "forward is another one after load_state_dict: some weights are not in",
        ),
        (check_energy, StateInTraining, "a.weight is another one when training resumes"),
        (check_energy, Decoder, "does not derive from jebm.parts.Energy"),
        (check_generator, InPlace, "changes its code in place"),
        (check_generator, Straight, "the gradient in code is"),
        (check_generator, OtherLayers, "its layers ((7,),) have 7 numbers, not the 5 of a code"),
        (check_inference, WrongScale, "the code is not mean + exp(log-variance / 2) * noise"),
        (check_likelihood, LooseMass, "p(x|u) of one pixel integrates to"),
    ],
)
def test_a_planted_fault_is_found_with_its_own_line(
    one_process: None, check: Callable[..., None], kind: Any, line: str
) -> None:
    with pytest.raises(AssertionError) as caught:
        check(kind)
    text = str(caught.value)
    assert text.startswith(f"{kind.__name__}: {line}")
    assert "\n" not in text


COLOUR = Shapes((3, 8, 8), ((2,), (4,)), 3)


@pytest.mark.parametrize(
    ("check", "kind", "shapes"),
    [
        (check_energy, Sum, []),
        (check_generator, Decoder, []),
        (check_inference, Encoder, [COLOUR]),
        (check_likelihood, Laplace, []),
        (check_energy, with_config(EnergyNet, EnergyConfig(width=5)), []),
        (check_energy, with_config(EnergyNet, EnergyConfig(width=5, spectral_norm=False)), []),
        (check_generator, with_config(GeneratorNet, GeneratorConfig((3,), 4)), []),
        (check_generator, with_config(GeneratorNet, GeneratorConfig((3, 3), 4, "concat")), [COLOUR]),
        (check_inference, with_config(InferenceNet, InferenceConfig((3,), 4)), []),
        (check_likelihood, with_config(Gaussian, LikelihoodConfig()), []),
        (check_likelihood, with_config(Gaussian, LikelihoodConfig(learn_std="per_channel")), [COLOUR]),
        (check_likelihood, Bernoulli, []),
    ],
)
def test_parts_without_faults_pass(
    one_process: None, check: Callable[..., None], kind: Any, shapes: list[Shapes]
) -> None:
    check(kind, *shapes)


def test_two_processes_train_as_one() -> None:
    check_energy(Sum, width=5)


# A rank that trains round after round, in a new group each time.
ROUNDS = """
import sys
import torch
from torch import nn
from jebm.testing import workers

class Linear:
    def build(self): return nn.Linear(8, 8)
    def outputs(self, part, inputs): return part(inputs[0])
    def scalar(self, output): return output.square().mean()
    def inputs(self, rows, seed): return (torch.ones(rows, 8),)

for number in range(25):
    workers._work(Linear(), int(sys.argv[1]), f"file://{sys.argv[2]}/{number}", None)
"""


def test_two_workers_end_each_time(tmp_path: Path) -> None:
    """Not only most times: as a group ends, torch may wait for a thread that waits for the GIL."""
    ranks = [subprocess.Popen([sys.executable, "-c", ROUNDS, str(rank), str(tmp_path)]) for rank in range(2)]
    try:
        assert [rank.wait(timeout=120) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
