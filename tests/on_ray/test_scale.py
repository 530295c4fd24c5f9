"""What a thousand workers cost the head and Ray's controller, from what one costs (docs/scaling.md)."""

import pytest

from jebm.on_ray.stopping import poll_seconds
from jebm.on_ray.trainer import health_check_seconds

KEYS = 2  # of a stop request: this run's, and that of all runs
CHECK_SECONDS = 0.68e-3  # of the controller, for each worker at each check


@pytest.mark.parametrize(("nodes", "gpus", "most"), [(1, 1, 4), (1, 16, 4), (2, 8, 4.2), (128, 8, 30)])
def test_the_head_is_asked_for_stop_requests_by_a_few(nodes: int, gpus: int, most: float) -> None:
    ranks = [(node * gpus + gpu, gpu) for node in range(nodes) for gpu in range(gpus)]
    periods = [period for rank in ranks if (period := poll_seconds(*rank)) is not None]
    assert KEYS * sum(1 / period for period in periods) <= most
    assert periods[0] == 0.5  # rank 0 hears at once


def test_the_controller_stays_a_tenth_of_a_core() -> None:
    for workers in (1, 16, 64, 128, 1024, 4096):
        assert workers * CHECK_SECONDS / health_check_seconds(workers) <= 0.1
    assert health_check_seconds(64) == 0.5
    assert health_check_seconds(1024) == 8
