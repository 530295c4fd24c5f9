"""Measures of factors on codes whose answer is known: the factors themselves, turned, and noise."""

import math

import pytest
import torch
from sklearn.metrics import mutual_info_score
from torch import Tensor

from jebm.evaluate.factors import BINS, information

IMAGES = 20_000
CATEGORIES = (4, 5, 2)


@pytest.fixture(scope="module")
def dice() -> Tensor:
    stream = torch.Generator().manual_seed(0)
    return torch.stack([torch.randint(n, (IMAGES,), generator=stream) for n in CATEGORIES], 1)


def noise(columns: int) -> Tensor:
    return torch.randn(IMAGES, columns, generator=torch.Generator().manual_seed(1))


def test_a_code_that_is_the_factors_has_it_all(dice: Tensor) -> None:
    found = information(dice.float(), dice, CATEGORIES)
    assert torch.allclose(found.shared_DF.diagonal(), found.entropy_F)
    assert found.entropy_F.tolist() == pytest.approx([math.log(n) for n in CATEGORIES], abs=1e-3)
    # Independent factors share only the bias, (4 - 1)(5 - 1)/2N = 0.0003 nats.
    assert found.gap() == pytest.approx(1, abs=0.002)
    assert found.disentanglement() == pytest.approx(1, abs=0.005)
    assert found.completeness() == pytest.approx(1, abs=0.005)


def test_a_turned_code_has_no_gap_and_is_mixed() -> None:
    """Two equal factors, turned by 45 degrees: each latent tells as much of the one as of the other."""
    stream = torch.Generator().manual_seed(0)
    factors_NF = torch.randint(4, (IMAGES, 2), generator=stream)
    turn = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    straight, turned = (
        information((factors_NF - 1.5) @ matrix, factors_NF, (4, 4)) for matrix in (torch.eye(2), turn)
    )
    assert straight.gap() > 0.99
    # Given one of two dice, their sum is as uncertain as the other die.
    share = torch.tensor([1, 2, 3, 4, 3, 2, 1]) / 16
    exact = float(torch.special.entr(share).sum()) - math.log(4)
    assert turned.shared_DF.flatten().tolist() == pytest.approx([exact] * 4, abs=0.02)
    assert turned.gap() < 0.02
    assert turned.disentanglement() < 0.01
    assert turned.completeness() < 0.01


def test_noise_tells_nothing(dice: Tensor) -> None:
    found = information(noise(6), dice, CATEGORIES)
    bias_F = torch.tensor([(BINS - 1) * (n - 1) / (2 * IMAGES) for n in CATEGORIES])
    assert (found.shared_DF < 2 * bias_F).all()
    assert found.gap() < 0.001
    assert found.completeness() < 0.05


def test_one_latent_for_all_factors_is_complete_but_mixed() -> None:
    stream = torch.Generator().manual_seed(0)
    factors_NF = torch.randint(4, (IMAGES, 2), generator=stream)
    code_ND = torch.cat([(factors_NF @ torch.tensor([4, 1]))[:, None].float(), noise(1)], 1)
    found = information(code_ND, factors_NF, (4, 4))
    assert found.gap() > 0.98  # MIG asks only that one latent tells a factor
    assert found.completeness() > 0.95
    assert found.disentanglement() < 0.05
    alone = found.of([0])
    assert alone.gap() == pytest.approx(1, abs=0.01)
    assert math.isnan(alone.completeness())


def test_the_information_is_that_of_scikit_learn(dice: Tensor) -> None:
    code_ND = noise(2) + dice[:, :1]
    found = information(code_ND, dice, CATEGORIES)
    edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64)[1:-1]
    for column in range(2):
        values = code_ND[:, column].double()
        low, high = values.min(), values.max()
        bins = torch.bucketize(values, low + edges * (high - low), right=True)
        for factor in range(3):
            known = mutual_info_score(bins.numpy(), dice[:, factor].numpy())
            assert found.shared_DF[column, factor].item() == pytest.approx(known, abs=2e-4)


def test_what_does_not_vary_tells_nothing() -> None:
    factors_NF = torch.zeros(100, 1, dtype=torch.long)
    found = information(torch.ones(100, 2), factors_NF, (3,))
    assert found.shared_DF.tolist() == [[0.0], [0.0]]
    assert [math.isnan(value) for value in (found.gap(), found.completeness())] == [True, True]
