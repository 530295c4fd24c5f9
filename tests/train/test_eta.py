"""The time that a run is said to take: what is known, and no more."""

from jebm.config import Config
from jebm.parser import config_from_dict
from jebm.train.journal import time_left


def config(share: float, **values: object) -> Config:
    return config_from_dict({"train": {"gaussian_share": share, "report_every_steps": 50}, **values})


def test_until_the_energy_has_joined_the_time_left_is_a_lower_bound() -> None:
    # 1,170 steps, the energy from 585 on: the report of step 600 still has steps without it.
    said = {step: time_left(config(0.5), step, 1170, 0.5) for step in (50, 550, 600, 650, 1170)}
    assert said == {
        50: "more than 9:20 left (the energy joins at step 585)",
        550: "more than 5:10 left (the energy joins at step 585)",
        600: "more than 4:45 left",
        650: "4:20 left",
        1170: "0:00 left",
    }


def test_without_such_a_beginning_it_is_an_estimate_at_once() -> None:
    assert time_left(config(0.0), 50, 170, 0.5) == "1:00 left"
    assert time_left(config(0.5, prior={"kind": "gaussian"}), 50, 170, 0.5) == "1:00 left"
    assert time_left(config(0.5), 20, 20, 0.5) == "0:00 left"
