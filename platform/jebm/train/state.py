"""Everything that training changes: a model's parts, their optimizers, the averaged weights, the step."""

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from jebm.config import Config, Optimizer
from jebm.core.by_class import named_modules
from jebm.core.model import JointModel, build_model
from jebm.core.objective import Objective
from jebm.errors import ConfigError
from jebm.train.finite import Finite
from jebm.train.runtime import Runtime

__all__ = ["Horizon", "Player", "TrainState", "learning_rate"]


class Horizon(NamedTuple):
    """How far a run goes, in updates."""

    steps_per_epoch: int
    total_steps: int


def learning_rate(config: Optimizer, step: int, horizon: Horizon) -> float:
    """Return the learning rate of update `step` (from 0), a pure function, so there is nothing to save."""
    rate = config.lr
    if config.schedule == "exponential":  # once per epoch, as in the paper's code
        rate *= config.decay_per_epoch ** (step // horizon.steps_per_epoch)
    elif config.schedule == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * min(1.0, step / horizon.total_steps)))
    if step < config.warmup_steps:
        rate *= (step + 1) / config.warmup_steps
    return rate


@dataclass(frozen=True)
class Player:
    """The parameters of one optimizer: generator with inference net, the likelihood's, or the energy net."""

    name: str
    config: Optimizer
    parameters: dict[str, nn.Parameter]
    adam: torch.optim.Adam

    @classmethod
    def build(cls, name: str, config: Optimizer, parameters: dict[str, nn.Parameter]) -> "Player":
        """Return the player with Adam's moments allocated, so that a checkpoint can be read into them."""
        adam = torch.optim.Adam(
            parameters.values(),
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=True,
        )
        for parameter in parameters.values():
            adam.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
        return cls(name, config, parameters, adam)

    def gradient_norm(self) -> Tensor:
        """Clip the gradient to `clip_norm` and return its Euclidean norm before clipping, ()."""
        if self.config.clip_norm is None:
            gradients = [each.grad for each in self.parameters.values() if each.grad is not None]
            return nn.utils.get_total_norm(gradients)
        return nn.utils.clip_grad_norm_(self.parameters.values(), self.config.clip_norm)

    def update(self, rate: float) -> None:
        """Take one Adam step at this learning rate."""
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.step()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, live tensor) of all moments and step counts."""
        for name, parameter in self.parameters.items():
            for part, tensor in self.adam.state[parameter].items():
                yield f"optimizer.{self.name}.{name}.{part}", tensor


@dataclass
class TrainState:
    """The state of training after `step` updates."""

    model: JointModel
    objective: nn.Module
    players: list[Player]
    """Generator with inference net and the likelihood's parameters, unless frozen; then the energy net."""
    ema: JointModel | None
    ema_decay: float
    finite: Finite
    step: int = 0

    @classmethod
    def build(cls, config: Config, runtime: Runtime) -> "TrainState":
        """Return the initial state, the same on every rank, on the runtime's device.

        The config is the user's own, so the modules of its classes are trusted.
        """
        model = build_model(config, named_modules(config)).to(runtime.device)
        on_cuda = runtime.device.type == "cuda"
        if on_cuda:  # as the activations: cuDNN's gradients then lie in DDP's buckets as they are
            for net in (model.generator, model.inference):
                net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        autocast = torch.bfloat16 if config.train.precision == "bf16" else None
        objective: nn.Module = Objective(model, autocast=autocast, penalty=config.energy.penalty)
        frozen = config.train.regime == "two_stage"
        if frozen:
            model.generator.requires_grad_(requires_grad=False)
            model.inference.requires_grad_(requires_grad=False)
            model.likelihood.requires_grad_(requires_grad=False)
        if runtime.world_size > 1 and not frozen:
            # Buffers are the spectral norm's singular vectors: a function of the weights' history, which is
            # the same on every rank, so they need no broadcast.
            with warnings.catch_warnings():
                # Newer torch renames the argument; older torch knows only this name.
                warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
                objective = DistributedDataParallel(
                    objective,
                    broadcast_buffers=False,
                    gradient_as_bucket_view=True,
                    # 25 MB exceed all gradients of most configs: a bucket that fills only at the end of the
                    # backward pass cannot overlap its reduction with it. NCCL's launches are worth more.
                    # What is compiled gives all gradients at its end.
                    bucket_cap_mb=25 if on_cuda or config.train.compile else 1,
                )
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        energy = {name: p for name, p in named.items() if name.startswith("energy.")}
        likelihood = {name: p for name, p in named.items() if name.startswith("likelihood.")}
        rest = {name: p for name, p in named.items() if name not in energy | likelihood}
        players = [] if frozen else [Player.build("generator", config.optimizer.generator, rest)]
        if likelihood and not frozen:
            players.append(Player.build("likelihood", config.optimizer.likelihood, likelihood))
        if model.energy is not None:
            if not energy:
                raise ConfigError(f"energy: {type(model.energy).__name__} has no parameter to learn")
            players.append(Player.build("energy", config.optimizer.energy, energy))
        decay = config.train.ema_decay
        ema = copy.deepcopy(model).requires_grad_(requires_grad=False) if decay else None
        finite = Finite(runtime.device)
        for player in players:  # as torch's own scaler of gradients does it
            player.adam.found_inf = finite.found_inf  # type: ignore[attr-defined]
        return cls(model, objective, players, ema, decay, finite)

    @property
    def picture_model(self) -> JointModel:
        """The model to draw pictures of: the averaged weights if they are kept."""
        return self.ema or self.model

    @contextmanager
    def gradients_stay_local(self, *, when: bool) -> Iterator[None]:
        """Keep backward from reducing over ranks if `when`: for all but a batch's last piece."""
        if when and isinstance(self.objective, DistributedDataParallel):
            with self.objective.no_sync():
                yield
        else:
            yield

    def end_step(self) -> None:
        """Do what follows all updates of a step, and count it."""
        self.average()
        self.finite.end_step(self.step)
        self.step += 1

    @torch.no_grad()
    def average(self) -> None:
        """Update the averaged weights from the current ones."""
        if self.ema is None:
            return
        torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - self.ema_decay)
        if self.ema.energy is not None:
            # Recomputed for the averaged weights: with the live singular vectors their slope would exceed the
            # bound.
            self.ema.energy.settle()

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor that a resume needs, by name: live ones, to save or to read into."""
        named = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        if self.ema is not None:
            named |= {f"ema.{name}": tensor for name, tensor in self.ema.state_dict().items()}
        for player in self.players:
            named |= dict(player.tensors())
        return named
