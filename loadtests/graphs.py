"""Runs two vision graphs in turns on the same pixels, to see whether a change of the graph costs time.

    python loadtests/graphs.py old/vision.onnx new/vision.onnx --batch 1 --pairs 300

A graph compared with a copy of itself shows how much of a difference is noise.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from time import perf_counter
from typing import Annotated

from vitrine.models.bundle.layout import DETAILS_INPUT, VISION_OUTPUTS  # first: it stops onnxruntime's telemetry
from vitrine.models.precision.sessions import session_options

# isort: split
import numpy as np
import onnxruntime
import typer


def main(
    first: Annotated[Path, typer.Argument(exists=True, help="vision.onnx of the first bundle.")],
    second: Annotated[Path, typer.Argument(exists=True, help="vision.onnx of the second bundle.")],
    pairs: Annotated[int, typer.Option(min=1, help="Number of runs of each.")] = 300,
    batch: Annotated[int, typer.Option(min=1, help="Number of images per batch.")] = 1,
) -> None:
    """Print the median of the pairs' ratios, second over first, and both medians."""
    sessions = [_open(path) for path in (first, second)]
    height, width = sessions[0].get_inputs()[0].shape[2:]
    pixels = np.random.default_rng(0).standard_normal((batch, 3, height, width), np.float32)
    feeds = {"pixels": pixels, DETAILS_INPUT: np.array(False)}
    # without a CLT not all of them
    names = [[output.name for output in one.get_outputs() if output.name in VISION_OUTPUTS] for one in sessions]
    seconds: list[list[float]] = [[], []]
    for number in range(-5, pairs):  # the first five warm up
        for which in (0, 1) if number % 2 else (1, 0):
            start = perf_counter()
            sessions[which].run(names[which], feeds)
            if number >= 0:
                seconds[which].append(perf_counter() - start)
    ratio = statistics.median(later / earlier for earlier, later in zip(*seconds, strict=True))
    medians = [statistics.median(times) * 1e3 for times in seconds]
    typer.echo(f"second over first: {ratio:.3f} (median of {pairs} pairs); {medians[0]:.2f} and {medians[1]:.2f} ms")


def _open(path: Path) -> onnxruntime.InferenceSession:
    options = session_options()
    # The threads of the session that has just run would otherwise keep the processors from the other one.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


if __name__ == "__main__":
    typer.run(main)
