"""One update of all three nets, or of only the energy net: built once per run, called at each step.

Shapes: N images of the set, B this rank's share of a batch, C channels, H height, W width, D latent width,
L latent layers.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from jebm.config import Config
from jebm.core.langevin import ChainInfo
from jebm.core.model import JointModel
from jebm.core.objective import Terms, energy_loss
from jebm.core.parts import Energy
from jebm.core.prior import PriorSampler
from jebm.core.schedule import rate_weights
from jebm.data.loader import to_float, upload
from jebm.rng import Noise
from jebm.train.finite import finite_seed
from jebm.train.metrics import Clock
from jebm.train.runtime import Runtime
from jebm.train.state import Horizon, Player, TrainState, learning_rate

__all__ = ["EnergyUpdate", "JointUpdate", "Outcome", "features_of"]

_IMAGES_AT_ONCE = 500


@dataclass(frozen=True)
class Outcome:
    """The result of an update."""

    metrics: Mapping[str, Tensor]
    """This rank's: () and (L,) tensors on the device. Their mean over ranks is the mean over the batch."""
    stop: bool
    """Whether any rank asked to stop."""


class _EnergyTerms(NamedTuple):
    """What an update of the energy alone finds: this rank's, without a gradient."""

    loss: Tensor
    """With the weight of this rank."""
    f_posterior: Tensor
    f_prior: Tensor
    gradient_norm: Tensor
    chain: ChainInfo | None


@dataclass
class _Update:
    """What an update needs and modifies."""

    state: TrainState
    config: Config
    runtime: Runtime
    noise: Noise
    horizon: Horizon
    clock: Clock

    def _weight(self, images: int) -> float:
        """Return the weight of this rank's mean over `images` in the mean over ranks: 1 if shares are equal.

        Ranks average gradients as if shares were equal; weighted so, the result is the mean over the batch.
        """
        ranks = self.runtime.world_size
        return 1.0 if ranks == 1 else images * ranks / self.config.train.batch_size

    def _move(self, player: Player) -> None:
        player.update(learning_rate(player.config, self.state.step, self.horizon))


@dataclass
class EnergyUpdate(_Update):
    """Updates only the energy net, `train.energy_updates` times a step; the other nets are frozen."""

    def __post_init__(self) -> None:
        self.net = cast(Energy, self.state.model.energy)
        (self._player,) = (player for player in self.state.players if player.name == "energy")
        self.sample = PriorSampler(self.state.model, self.config.langevin)
        self.kernel = self.sample.kernel
        """What computes the chains."""
        self._loss = energy_loss

    def compile(self, features: Sequence[Tensor]) -> Iterator[None]:
        """Have torch compile loss and gradient, for features of such shapes; yield after each graph."""
        self._loss = torch.compile(energy_loss, fullgraph=True, dynamic=False)
        model, count = self.state.model, len(features[0])
        noise_BD, prior_BD = (features[0].new_zeros(count, model.latent_dim) for _ in range(2))
        loss, *_ = self._loss(model, features, noise_BD, prior_BD, self.config.energy.penalty)
        torch.autograd.grad(loss, list(self._player.parameters.values()))
        yield

    def __call__(self, features: Sequence[Tensor], stop: bool = False) -> Outcome:
        """Do step `state.step` on the features of q(u|x); the metrics are its last update's.

        From the first gradient on that is not finite nothing moves, and `state.finite` knows.
        """
        (all_go_on,) = self.runtime.agree(not stop)
        last = [self.again(features, i) for i in range(self.config.train.energy_updates)][-1]
        self.state.end_step()
        weight = self._weight(len(features[0]))
        means = {
            "loss": last.loss,
            "f_posterior": _scaled(last.f_posterior, weight),
            "f_prior": _scaled(last.f_prior, weight),
            "gradient_norm/energy": last.gradient_norm,
        }
        return Outcome(means | _chain_metrics(last.chain, weight), not all_go_on)

    def again(self, features: Sequence[Tensor], i: int) -> _EnergyTerms:
        """Do the `i`-th update of step `state.step`: new chains, new samples of the posteriors."""
        state, step, player, model = self.state, self.state.step, self._player, self.state.model
        count = len(features[0])
        weight = self._weight(count)
        with self.clock("chain"):
            prior_BD, chain = self.sample(count, self.noise(step, f"prior chain {i}"))
        noise_BD = self.noise(step, f"posterior {i}")(count, model.latent_dim)
        penalty = self.config.energy.penalty
        loss, f_posterior, f_prior = self._loss(model, features, noise_BD, prior_BD, penalty)
        loss = _scaled(loss, weight)
        self._differentiate(loss)
        norm = player.gradient_norm()
        state.finite.take(norm)
        self._move(player)
        player.adam.zero_grad()
        self.net.settle()
        return _EnergyTerms(loss.detach(), f_posterior, f_prior, norm.detach(), chain)

    def _differentiate(self, loss: Tensor) -> None:
        """Set the energy's gradient to the mean over ranks.

        A few thousand numbers: one all-reduce here, instead of DDP, which has the same parameters in its
        buckets.
        """
        parameters = list(self._player.parameters.values())
        gradients = torch.autograd.grad(loss, parameters, finite_seed(loss))
        flat = self.runtime.mean(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        parts = torch.split(flat, [parameter.numel() for parameter in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)


@dataclass
class JointUpdate(_Update):
    """Updates all three nets from one loss, then the energy again (`train.energy_updates`)."""

    def __post_init__(self) -> None:
        joins = self.config.energy_joins_at(self.horizon.total_steps)
        self._joins_at = math.inf if joins is None else joins
        self._without_energy = [player for player in self.state.players if player.name != "energy"]
        self._energy: EnergyUpdate | None = None
        self.kernel = "none (Gaussian prior)"
        """What computes the chains."""
        if joins is not None:
            self._energy = EnergyUpdate(
                self.state, self.config, self.runtime, self.noise, self.horizon, self.clock
            )
            self.kernel = self._energy.kernel

    def compile(self, x_BCHW: Tensor) -> Iterator[None]:
        """Do what `EnergyUpdate.compile` does, for all losses of the steps to come on so many images."""
        model, objective, steps = self.state.model, self.state.objective, self.horizon.total_steps
        if isinstance(objective, DistributedDataParallel):
            objective = objective.module  # whose gradients are this rank's alone
        objective.compile(fullgraph=True, dynamic=False)
        weight_L = self._rate_weights(x_BCHW)
        parameters = [each for each in model.parameters() if each.requires_grad]
        noise_BD, prior_BD = (x_BCHW.new_zeros(len(x_BCHW), model.latent_dim) for _ in range(2))
        terms: list[Terms] = []
        # Without samples of the prior until the energy joins, then with them.
        joins = self._joins_at < steps
        for codes in [None] * (self.state.step < self._joins_at) + [prior_BD] * joins:
            terms = []
            for x, e, z in self._pieces(x_BCHW, noise_BD, codes):
                terms.append(objective(x, e, z, weight_L))
                torch.autograd.grad(terms[-1].loss, parameters, allow_unused=True)
                yield
        if joins and self._energy is not None and self.config.train.energy_updates > 1:
            yield from self._energy.compile(_joined(terms))

    def __call__(self, x_BCHW: Tensor, stop: bool = False) -> Outcome:
        """Do step `state.step` on this rank's images in [-1, 1].

        If loss or gradient is not finite on some rank, nothing moves on any from there on, and `state.finite`
        knows.
        """
        state, step = self.state, self.state.step
        energy = self._energy if step >= self._joins_at else None

        # Negative phase, on the bare energy net: nothing here concerns DDP.
        prior_BD, chain = None, None
        if energy is not None:
            with self.clock("chain"):
                prior_BD, chain = energy.sample(len(x_BCHW), self.noise(step, "prior chain"))

        # One loss, one forward and one backward through all nets.
        terms, weights = self._backward(x_BCHW, prior_BD)
        means = {
            name.removesuffix("_L"): _mean([getattr(piece, name) for piece in terms], weights)
            for name in ("loss", "distortion", "rate_L", "f_posterior", "f_prior")
        }
        moving = self._without_energy if energy is None else state.players
        norms = {f"gradient_norm/{player.name}": player.gradient_norm().detach() for player in moving}
        state.finite.take(torch.stack(list(norms.values())).sum())

        # Optimizers step first, then whatever depends on the weights, then further energy updates.
        for player in moving:
            self._move(player)
        for player in state.players:
            player.adam.zero_grad()
        if energy is not None:
            energy.net.settle()
            features = _joined(terms)
            for i in range(1, self.config.train.energy_updates):
                energy.again(features, i)
        state.end_step()
        (all_go_on,) = self.runtime.agree(not stop)
        chains = _chain_metrics(chain, self._weight(len(x_BCHW)))
        return Outcome(means | norms | state.model.likelihood.metrics() | chains, not all_go_on)

    def _backward(self, x_BCHW: Tensor, prior_BD: Tensor | None) -> tuple[list[Terms], list[float]]:
        """Accumulate the gradients of the share's pieces, reduced over ranks; return their terms and weights.

        The mean of weighted terms over pieces and ranks is the mean over the batch.
        """
        noise_BD = self.noise(self.state.step, "posterior")(len(x_BCHW), self.state.model.latent_dim)
        weight_L = self._rate_weights(x_BCHW)
        pieces = self._pieces(x_BCHW, noise_BD, prior_BD)
        terms: list[Terms] = []
        weights: list[float] = []
        for x, e, z in pieces:
            weights.append(self._weight(len(x_BCHW)) * (len(x) * len(pieces) / len(x_BCHW)))
            with self.state.gradients_stay_local(when=len(weights) < len(pieces)):
                terms.append(self.state.objective(x, e, z, weight_L))
                share = len(pieces) / weights[-1]
                loss = terms[-1].loss if share == 1 else terms[-1].loss / share
                torch.autograd.backward(loss, finite_seed(loss))
        return terms, weights

    def _pieces(
        self, x_BCHW: Tensor, noise_BD: Tensor, prior_BD: Tensor | None
    ) -> list[tuple[Tensor, Tensor, Tensor | None]]:
        """Return the share's `train.accumulate` pieces."""
        count = self.config.train.accumulate
        priors = [None] * count if prior_BD is None else prior_BD.tensor_split(count)
        return list(zip(x_BCHW.tensor_split(count), noise_BD.tensor_split(count), priors, strict=True))

    def _rate_weights(self, x_BCHW: Tensor) -> Tensor | None:
        """Return the weights of the layers' rates at this step, (L,); None if all are 1.

        None and a tensor would be two graphs to compile: with `train.compile` ones are a tensor as well.
        """
        progress, config = self.state.step / self.horizon.total_steps, self.config
        weights = rate_weights(config.hierarchy, len(self.state.model.latent_dims), progress)
        if weights is None and config.train.compile and config.hierarchy.rate_factor != 1:
            weights = [1.0] * len(self.state.model.latent_dims)
        return None if weights is None else upload(torch.tensor(weights, dtype=x_BCHW.dtype), x_BCHW.device)


def _joined(terms: Sequence[Terms]) -> list[Tensor]:
    """Return the features of all pieces together."""
    pieces = zip(*(piece.features for piece in terms), strict=True)
    return [torch.cat(each) if len(each) > 1 else each[0] for each in pieces]


def _scaled(value: Tensor, weight: float) -> Tensor:
    return value if weight == 1 else value * weight


def _mean(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    scaled = [_scaled(*each).detach() for each in zip(values, weights, strict=True)]
    return torch.stack(scaled).mean(0) if len(scaled) > 1 else scaled[0]


def _chain_metrics(chain: ChainInfo | None, weight: float) -> dict[str, Tensor]:
    if chain is None:  # no chain: the prior is Gaussian
        return {}
    values = {"chain/gradient_norm": chain.gradient_norm, "chain/displacement": chain.displacement}
    return {name: _scaled(value, weight) for name, value in values.items()}


@torch.no_grad()
def features_of(
    model: JointModel, images_NHWC: npt.NDArray[np.uint8], runtime: Runtime, *, most_bytes: float = math.inf
) -> list[Tensor] | None:
    """Return the features of q(u|x) of all images, (N, …) each, on every rank; each computes a share.

    None if they would take more than `most_bytes`.
    """
    # Every rank takes part in the sums below, also one without a share: shapes come from an image of zeros.
    nothing = model.inference(next(model.parameters()).new_zeros(1, *model.shapes.image))
    if len(images_NHWC) * sum(each.nbytes for each in nothing) > most_bytes:
        return None
    found = [each.new_zeros(len(images_NHWC), *each.shape[1:]) for each in nothing]
    for position in range(runtime.rank, -(-len(images_NHWC) // _IMAGES_AT_ONCE), runtime.world_size):
        rows = slice(position * _IMAGES_AT_ONCE, (position + 1) * _IMAGES_AT_ONCE)
        x_BCHW = to_float(images_NHWC[rows].copy(), runtime.device)  # torch warns about read-only memory
        features = model.inference(x_BCHW)
        for whole, part in zip(found, features, strict=True):
            whole[rows] = part
    # Other ranks' rows are zero here, so the sum is exact.
    return [runtime.total(each) for each in found]
