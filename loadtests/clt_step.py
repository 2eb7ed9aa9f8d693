"""One CLT training step (encode, decode, backward), sparse decode against dense decode, in pairs on the same tokens.

python loadtests/clt_step.py --features 768 --width 128
python loadtests/clt_step.py --features 6144 --width 768 --tokens 256 --pairs 3     (B/32 shapes)
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from rich.progress import track
from torch import Tensor

from models.clt import CrossLayerTranscoder
from models.sparsify import Code


def main(
    layers: int = 12,
    width: int = 128,
    features: int = 768,
    k: int = 32,
    tokens: Annotated[int, typer.Option(help="Tokens a step.")] = 2080,
    pairs: Annotated[int, typer.Option(help="Timed pairs, after one that is not counted.")] = 10,
) -> None:
    """Print the median of each step and of the pairs' ratios."""
    clt = CrossLayerTranscoder(layers, width, features, k)
    clt.initialise(torch.Generator().manual_seed(0))
    inputs = torch.randn(layers, tokens, width)

    def step(decode: Callable[[Code], Tensor]) -> float:
        clt.zero_grad(set_to_none=True)
        start = time.perf_counter()
        decode(clt.encode(inputs)).square().mean().backward()
        return time.perf_counter() - start

    timed = [(step(clt.decode), step(clt.decode_dense)) for _ in track(range(pairs + 1), "pairs")][1:]
    sparse, dense = (statistics.median(column) * 1e3 for column in zip(*timed, strict=True))
    ratio = statistics.median(slow / fast for fast, slow in timed)
    print(
        f"L {layers}, d {width}, F {features}, k {k}, {tokens} tokens, {torch.get_num_threads()} threads: "
        f"sparse {sparse:.0f} ms, dense {dense:.0f} ms, dense/sparse {ratio:.1f}"
    )


if __name__ == "__main__":
    typer.run(main)
