"""From the cost of one image to processors or GPUs, and dollars per day: the tables of deploy/CAPACITY.md.

    python loadtests/capacity.py --milliseconds 110 --price 0.041
    python loadtests/capacity.py --milliseconds 1.2 --price 1.0 --unit GPUs

For `--milliseconds` use what `loadtests/latency.py` prints: processor time in the service per answer (or a GPU's time).
"""

from __future__ import annotations

import math
from typing import Annotated, NamedTuple

import typer

DAY = 86_400
IMAGES_A_DAY = (1_000_000, 100_000_000, 10_000_000_000)


class Plan(NamedTuple):
    """Resources and cost of a load."""

    mean: float  # images a second
    peak: float
    units: int  # processors or GPUs, for the peak
    dollars: float  # a day
    scaled: float  # a day, with as many units as each hour needs


def plan(images_a_day: float, milliseconds: float, price: float, peak: float = 2.0, load: float = 0.8) -> Plan:
    """Units and cost for images that each take `milliseconds` of a unit.

    Args:
        price: dollars an hour of a unit.
        peak: busiest second over the mean one.
        load: share of their time that units may be busy, before waiting grows.
    """
    mean = images_a_day / DAY
    busy = milliseconds / 1e3 / load  # units that one image a second needs
    units = math.ceil(mean * peak * busy)
    return Plan(mean, mean * peak, units, units * price * 24, min(units, max(1.0, mean * busy)) * price * 24)


def main(
    milliseconds: Annotated[float, typer.Option(min=1e-6, help="Milliseconds of a processor, or GPU, per image.")],
    price: Annotated[float, typer.Option(min=0, help="Dollars per hour of one processor or GPU.")],
    peak: Annotated[float, typer.Option(min=1, help="Load of the busiest second, relative to the mean.")] = 2.0,
    load: Annotated[
        float, typer.Option(min=0.01, max=1, help="Share of the time in which the units may be busy.")
    ] = 0.8,
    unit: Annotated[str, typer.Option(help="Name of the unit that is counted.")] = "processors",
) -> None:
    """Print a table for 1 million, 100 million and 10 billion images per day."""
    print(f"| images a day | mean, a second | peak | {unit} | $ a day | $ a day, scaled by the hour |")
    print("|---|---|---|---|---|---|")
    for images in IMAGES_A_DAY:
        figures = plan(images, milliseconds, price, peak, load)
        print(
            f"| {images:,} | {figures.mean:,.1f} | {figures.peak:,.1f} | {figures.units:,} | {figures.dollars:,.0f} "
            f"| {figures.scaled:,.0f} |"
        )


if __name__ == "__main__":
    typer.run(main)
