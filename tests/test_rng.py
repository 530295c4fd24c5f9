"""Randomness as a function of (seed, rank, position, purpose)."""

import itertools
import math

import pytest
import torch

from jebm.rng import gaussian_noise, generator

ELSEWHERE = [(1, 0, 0, "data"), (0, 1, 0, "data"), (0, 0, 1, "data"), (0, 0, 0, "chain")]


def draw(*place, count=8):
    return torch.randn(count, generator=generator(*place))


def test_the_same_place_gives_the_same_stream_whatever_came_before():
    first = draw(3, 1, 7, "chain")
    torch.manual_seed(5)
    draw(0, 0, 0, "other")
    assert torch.equal(first, draw(3, 1, 7, "chain"))


@pytest.mark.parametrize("place", ELSEWHERE)
def test_each_argument_changes_the_stream(place):
    assert not torch.equal(draw(0, 0, 0, "data"), draw(*place))


def test_arguments_do_not_run_into_each_other():
    """(1, 11) and (11, 1) are different places; so are all others of a whole grid.

    Torch's CPU generator reads the low 32 bits of its seed only: those must differ.
    """
    places = itertools.product((0, 1, 11, 111), (0, 1, 11, 111), (0, 1, 11, 111), ("chain", "1/chain"))
    seeds = [generator(*place).initial_seed() % 2**32 for place in places]
    assert len(set(seeds)) == len(seeds) == 128


def test_the_streams_are_these_forever():
    """A checkpoint of today resumes tomorrow: the map from place to stream must not change."""
    assert generator(0, 0, 0, "chain").initial_seed() == 7992496307865211941
    assert generator(1, 2, 3, "data order").initial_seed() == 8097209184876693953
    normal = gaussian_noise(1, 2)(3, "prior chain 1")
    assert [normal.key(), normal.key()] == [(2388636064, 1213415958), (33454395, 2444356328)]


def test_the_global_generator_is_neither_read_nor_moved():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    gaussian_noise(0, 0)(0, "chain")(10, 10)
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_goes_on_within_a_place_and_starts_anew_at_each():
    noise = gaussian_noise(0, 1)
    normal = noise(5, "chain")
    first, second = normal(2, 3), normal(2, 3)
    assert first.shape == (2, 3)
    assert first.dtype == torch.float32
    assert not torch.equal(first, second)
    again = noise(5, "chain")
    assert torch.equal(again(2, 3), first)
    assert torch.equal(again(2, 3), second)
    assert torch.equal(first, torch.randn(2, 3, generator=generator(0, 1, 5, "chain")))


def test_noise_is_standard_normal():
    draws = gaussian_noise(0, 0)(0, "chain")(1_000_000)
    assert abs(draws.mean().item()) < 5e-3
    assert draws.var().item() == pytest.approx(1, abs=5 * math.sqrt(2e-6))
    assert draws.pow(4).mean().item() == pytest.approx(3, abs=5 * math.sqrt(96e-6))


def test_ranks_positions_seeds_and_purposes_are_uncorrelated():
    """60 streams of 40,000 draws: the 1,770 correlations are as independent ones are, N(0, 1/40,000)."""
    count = 40_000
    places = [(0, rank, position, "chain") for rank in range(5) for position in range(5)]
    places += [(seed, 0, position, "chain") for seed in range(1, 5) for position in range(5)]
    places += [
        (0, 0, position, purpose) for purpose in ("posterior", "data order", "x") for position in range(5)
    ]
    streams = torch.stack([draw(*place, count=count).double() for place in places])
    assert len(places) == 60
    z = torch.corrcoef(streams)[*torch.triu_indices(60, 60, offset=1)] * math.sqrt(count)
    assert z.abs().max() < 4.75
    assert z.square().mean().item() == pytest.approx(1, abs=5 * math.sqrt(2 / len(z)))
    ahead = (streams[:-1, :-1] * streams[1:, 1:]).mean(1) * math.sqrt(count)  # nor shifted by one draw
    assert ahead.abs().max() < 4.75
