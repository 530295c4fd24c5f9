"""How long a run still takes, as far as that is known."""

from jebm.config import Config

__all__ = ["time_left"]


def time_left(config: Config, step: int, total_steps: int, seconds_per_step: float) -> str:
    """Return the time to the end at the speed since the last report, such as `12:05 left`.

    Steps with the energy take longer than those before it joins (`train.gaussian_share`). Their speed is
    unknown until a report lies entirely after that step; until then this is a lower bound, and says so.
    """
    left = int((total_steps - step) * seconds_per_step)
    text = f"{left // 60}:{left % 60:02d} left"
    joins = config.energy_joins_at(total_steps) or 0
    known_from = joins + config.train.report_every_steps if joins else 0
    if step >= min(known_from, total_steps):
        return text
    return f"more than {text}" + (f" (the energy joins at step {joins})" if step < joins else "")
