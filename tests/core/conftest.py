"""What the tests of the mathematics share: one thread, and a model small enough for quadrature."""

from collections.abc import Iterator

import pytest
import torch

from jebm.config import Config, Energy, Generator, Inference, Likelihood, Model, Prior
from jebm.core.model import JointModel


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_model():
    """Return a function: (latent_dims, energy section) -> model on 4 x 4 grey images, likelihood std 0.8."""

    def build(latent_dims: tuple[int, ...], seed: int = 0, kind="joint", **energy) -> JointModel:
        levels = len(latent_dims) - 1
        config = Config(
            model=Model(4, 1, latent_dims),
            likelihood=Likelihood(std=0.8),
            inference=Inference((2,) * levels, 4),
            generator=Generator((2,) * levels, 4),
            prior=Prior(kind),
            energy=Energy(**{"width": 8, **energy}),
        )
        torch.manual_seed(seed)
        return JointModel(config)

    return build
