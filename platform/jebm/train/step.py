"""One update of all three nets."""

import math

import torch
from torch import Tensor

from jebm.config import Config
from jebm.core.objective import Terms
from jebm.core.prior import sample_prior
from jebm.errors import DivergedError
from jebm.rng import Noise
from jebm.train.metrics import Clock
from jebm.train.runtime import Runtime
from jebm.train.state import TrainState, learning_rate

__all__ = ["train_step"]


def train_step(
    state: TrainState,
    config: Config,
    runtime: Runtime,
    x_BCHW: Tensor,
    noise: Noise,
    clock: Clock,
    *,
    steps_per_epoch: int,
    total_steps: int,
    stop: bool = False,
) -> tuple[dict[str, Tensor], bool]:
    """Do update `state.step` on this rank's share of the batch.

    Returns this rank's metrics (() and (L,) tensors on the device) and whether any rank's `stop` is set.

    Raises:
        DivergedError: loss or gradient is not finite on some rank. Raised on all ranks, before any parameter
            moved.
    """
    step = state.step
    # Negative phase, on the bare energy net: nothing here belongs to DDP.
    with clock("chain"):
        prior_z, chain = sample_prior(state.model, config.langevin, len(x_BCHW), noise(step, "prior chain"))
    posterior_noise = noise(step, "posterior")(len(x_BCHW), state.model.latent_dim)
    pieces = config.train.accumulate
    terms: list[Terms] = []
    for i, (x, e, z) in enumerate(
        zip(x_BCHW.chunk(pieces), posterior_noise.chunk(pieces), prior_z.chunk(pieces), strict=True)
    ):
        with state.gradients_stay_local(when=i < pieces - 1):
            terms.append(state.objective(x, e, z))
            torch.autograd.backward(terms[-1].loss / pieces)
    mean = Terms(*(torch.stack(parts).mean(0) for parts in zip(*terms, strict=True)))
    norms = {player.name: player.gradient_norm() for player in state.players}

    finite = math.isfinite(float(mean.loss.detach() + sum(norms.values())))
    all_finite, all_go_on = runtime.agree(finite, not stop)
    if not all_finite:
        raise DivergedError(
            f"loss or gradient is not finite at step {step} (no parameter was moved by it); "
            "lower optimizer.energy.lr or energy.output_scale, or turn energy.spectral_norm on"
        )
    for player in state.players:
        player.update(
            learning_rate(player.config, step, steps_per_epoch=steps_per_epoch, total_steps=total_steps)
        )
        player.adam.zero_grad()
    if state.model.energy is not None:
        state.model.energy.power_iteration()
    state.average()
    state.step += 1

    metrics = {
        "loss": mean.loss,
        "distortion": mean.distortion,
        "rate": mean.rate_L,
        "f_posterior": mean.f_posterior,
        "f_prior": mean.f_prior,
        **{f"gradient_norm/{name}": norm for name, norm in norms.items()},
    }
    if chain is not None:
        metrics |= {"chain/gradient_norm": chain.gradient_norm, "chain/displacement": chain.displacement}
    return {name: value.detach() for name, value in metrics.items()}, not all_go_on
