"""The three nets together."""

import torch
from torch import nn

from jebm.config import Config
from jebm.core.energy import EnergyNet
from jebm.core.generator import GeneratorNet
from jebm.core.inference import InferenceNet
from jebm.rng import generator

__all__ = ["JointModel", "build_model"]


class JointModel(nn.Module):
    """Generator p(x|z), inference net q(z|x) and energy net f(z); `energy` is None for the Gaussian prior."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.latent_dims = list(config.model.latent_dims)
        self.latent_dim = sum(self.latent_dims)
        self.likelihood_std = config.model.likelihood_std
        self.inference = InferenceNet(config.model, config.inference)
        self.generator = GeneratorNet(config.model, config.generator)
        # Last, so that generator and inference net have the same initial weights with and without it.
        self.energy: EnergyNet | None = None
        if config.has_energy:
            unseen = sum(self.latent_dims[:-1]) if config.prior.kind == "top" else 0
            self.energy = EnergyNet(self.latent_dim, config.energy, unseen=unseen)


def build_model(config: Config) -> JointModel:
    """Return the model on the CPU with initial weights that depend only on `config.run.seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(config.run.seed, 0, 0, "initial weights").initial_seed())
        return JointModel(config)
