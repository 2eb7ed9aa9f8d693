"""Load over time: what share of a rate is offered, and for how long."""

from __future__ import annotations

from typing import NamedTuple


class Step(NamedTuple):
    """`seconds` at `share` of the rate."""

    share: float
    seconds: float


PROFILES: dict[str, tuple[Step, ...]] = {
    "smoke": (Step(0.2, 10),),
    "steady": (Step(1.0, 60),),
    # To the knee and beyond: the rate is the expected knee.
    "step": tuple(Step(share, 20) for share in (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0)),
    "spike": (Step(0.5, 20), Step(2.0, 15), Step(0.5, 30)),
    "soak": (Step(0.7, 1800),),
}


def users_at(profile: tuple[Step, ...], rate: float, seconds: float, elapsed: float) -> int | None:
    """Users, of one request a second each, after `elapsed` seconds; None when the profile is over.

    seconds: length of every step, instead of the profile's own; 0: the profile's own.
    """
    for step in profile:
        duration = seconds or step.seconds
        if elapsed < duration:
            return max(1, round(step.share * rate))
        elapsed -= duration
    return None
