"""One training step, sparse against dense: tokens per second, peak memory, and whether the gradients are equal.

    python loadtests/training_step.py --quick
    python loadtests/training_step.py --shape b32 --tokens 256 --pairs 3
    python loadtests/training_step.py --shape b16 --device cuda --matmul tf32 --json rows.json
    python loadtests/training_step.py --dictionary residual_sae --shape photo --k 48 --tokens 1576
    python loadtests/training_step.py --features 768 --features 1536 --k 16 --k 32     (a grid: every combination)

A step is encode, decode, loss, backward; fused Adam is timed separately. Weights and tokens are random: speed does not
depend on them, except for caches, where random features are the worst case. Sparse and dense alternate on the same
tokens and weights; medians of the pairs. Peak memory comes from one process for each configuration and each side.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from vitrine.models.dictionary.clt import Architecture, CrossLayerTranscoder
from vitrine.models.dictionary.residual_sae import ResidualSaes, SaeArchitecture
from vitrine.models.dictionary.sparsify import Kind
from vitrine.training.recipes.costs import GIB, Gpu, Matmul, dictionary_work, step_memory, writers

Dictionary = Literal["clt", "residual_sae"]
Shape = Literal["demo", "photo", "b32", "b16"]
Device = Literal["cpu", "cuda"]
Side = Literal["sparse", "dense"]
SHAPES: dict[Shape, tuple[int, int, int, int]] = {  # layers, width, features, tokens of an image
    "demo": (12, 128, 768, 65),
    "photo": (12, 192, 768, 197),
    "b32": (12, 768, 6144, 50),
    "b16": (12, 768, 6144, 197),
}
QUICK = ((4, 128, 1024, 16, 512), (4, 128, 1024, 32, 512), (4, 128, 4096, 32, 512), (8, 128, 1024, 32, 512))
SIDES: tuple[Side, Side] = ("sparse", "dense")


@dataclass(frozen=True)
class Configuration:
    layers: int
    width: int
    features: int
    k: int
    tokens: int
    pairs: int
    device: Device
    matmul: Matmul
    sparsifier: Kind
    dictionary: Dictionary = "clt"

    @property
    def architecture(self) -> Architecture | SaeArchitecture:
        if self.dictionary == "residual_sae":
            saes = self.layers - 1
            budget = (self.k,) * saes
            return SaeArchitecture(self.width, (self.features,) * saes, budget, budget, self.sparsifier)
        budget = (self.k,) * self.layers
        return Architecture(self.layers, self.width, self.features, budget, budget, self.sparsifier)

    @property
    def dense_bytes(self) -> int:
        """Peak memory of the dense step: Adam's four tables, and one [N, F] code for every decoder."""
        codes = 4 * self.tokens * self.features * (len(writers(self.architecture)) + 4)
        return 16 * self.architecture.parameters + step_memory(self.architecture, self.tokens) + codes


class Step:
    """A CLT or SAEs, the optimiser, and random tokens that do not change."""

    def __init__(self, configuration: Configuration) -> None:
        self.configuration, device = configuration, torch.device(configuration.device)
        generator = torch.Generator(device).manual_seed(0)
        with device:
            architecture = configuration.architecture
            self.model: CrossLayerTranscoder | ResidualSaes
            if isinstance(architecture, SaeArchitecture):
                self.model = ResidualSaes(architecture)
            else:
                self.model = CrossLayerTranscoder(architecture)
            self.model.initialise(generator)
            shape = architecture.layers, configuration.tokens, configuration.width
            self.inputs = torch.randn(shape, generator=generator)
            self.targets = torch.randn(shape, generator=generator)
            self.is_cls = torch.arange(configuration.tokens) % 50 == 0
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=1e-6, fused=True)

    def gradients(self, side: Side) -> float:
        """Forward and backward; returns seconds."""
        self.model.zero_grad(set_to_none=True)
        start = _now(self.configuration.device)
        half = self.configuration.matmul == "bf16"
        with torch.autocast(self.configuration.device, torch.bfloat16) if half else nullcontext():
            outputs = self._sparse() if side == "sparse" else self._dense()
        (outputs.float() - self.targets).square().mean().backward()
        return _now(self.configuration.device) - start

    def update(self) -> float:
        """The optimiser's step, and SAEs' rows made of length 1; returns seconds."""
        start = _now(self.configuration.device)
        self.optimiser.step()
        if isinstance(self.model, ResidualSaes):
            self.model.renormalise()
        return _now(self.configuration.device) - start

    def _sparse(self) -> Tensor:
        return self.model(self.inputs, self.is_cls)[1]

    def _dense(self) -> Tensor:
        layers = zip(self.model.encoders, self.inputs, strict=True)
        codes = [encoder.encode_dense(x, self.is_cls) for encoder, x in layers]
        if isinstance(self.model, ResidualSaes):
            decoders = zip(self.model.decoders, codes, strict=True)
            return torch.stack([decoder.decode_dense(code) for decoder, code in decoders])
        return torch.stack([decoder.decode_dense(codes) for decoder in self.model.decoders])


def compare(configuration: Configuration, sides: tuple[Side, ...]) -> dict[str, Any]:
    """Medians of the pairs after one warm-up pair, and the largest difference of the gradients."""
    step = Step(configuration)
    row: dict[str, Any] = {"gradient_difference": _gradient_difference(step) if len(sides) == 2 else None}
    timed: dict[Side, list[tuple[float, float]]] = {side: [] for side in sides}
    for turn in range(configuration.pairs + 1):
        for side in sides if turn % 2 else sides[::-1]:
            timed[side].append((step.gradients(side), step.update()))
    for side, times in timed.items():
        row[f"{side}_seconds"] = statistics.median(step for step, _ in times[1:])
        row[f"{side}_seconds_with_adam"] = statistics.median(step + adam for step, adam in times[1:])
    if len(sides) == 2:
        paired = list(zip(timed["sparse"][1:], timed["dense"][1:], strict=True))
        row["dense_over_sparse"] = statistics.median(slow[0] / fast[0] for fast, slow in paired)
        row["dense_over_sparse_with_adam"] = statistics.median(sum(slow) / sum(fast) for fast, slow in paired)
    machine = _machine(configuration)
    work = dictionary_work(
        configuration.architecture, configuration.tokens, cls=0
    )  # whose budget is that of the others
    minimum = sum(part.seconds(machine, configuration.matmul, 1.0) for part in work)
    row["machine_tflops"], row["machine_gb_per_second"] = machine.fp32, machine.bandwidth * 1e3
    row["sparse_share_of_peak"] = minimum / row["sparse_seconds"]
    return row


def _gradient_difference(step: Step) -> float:
    """max |sparse - dense| / max |dense| of a parameter, the largest over all parameters."""
    step.gradients("sparse")
    sparse = [parameter.grad for parameter in step.model.parameters()]
    step.gradients("dense")
    worst = 0.0
    for parameter, ours in zip(step.model.parameters(), sparse, strict=True):
        assert parameter.grad is not None
        assert ours is not None
        scale = parameter.grad.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        worst = max(worst, float((ours - parameter.grad).abs().max() / scale))
    return worst


def peak_memory(configuration: Configuration, side: Side) -> dict[str, Any]:
    """Bytes that two steps with Adam need at their peak: of the GPU, or of this whole process."""
    step = Step(configuration)
    for _ in range(2):
        step.gradients(side)
        step.update()
    if configuration.device == "cuda":
        return {f"{side}_peak_bytes": torch.cuda.max_memory_allocated()}
    unit = 1 if sys.platform == "darwin" else 1024
    return {f"{side}_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}


def _machine(configuration: Configuration) -> Gpu:
    """This machine's peaks, measured now: a large matrix product, a large copy."""
    device = configuration.device
    size = 8192 if device == "cuda" else 1024
    square = torch.randn(size, size, device=device).to(torch.bfloat16 if configuration.matmul == "bf16" else None)
    block = torch.ones(2**26, device=device)
    copy = torch.empty_like(block)
    tflops = 2 * size**3 / _fastest(lambda: square @ square, device) / 1e12
    bandwidth = 2 * block.nbytes / _fastest(lambda: copy.copy_(block), device) / 1e12
    return Gpu(device, tflops, tflops, tflops, bandwidth, 0)


def _fastest(work: Callable[[], object], device: Device) -> float:
    """Seconds of the fastest of five."""
    times = []
    for _ in range(6):
        start = _now(device)
        work()
        times.append(_now(device) - start)
    return min(times)


def _now(device: Device) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _free_bytes(device: Device) -> int:
    """Memory that a process may still allocate."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _work(task: str) -> None:
    """The work of one process: takes its task as JSON, prints its result as JSON on standard output."""
    fields = json.loads(task)
    configuration, job = Configuration(**fields["configuration"]), fields["doing"]
    torch.set_float32_matmul_precision("high" if configuration.matmul == "tf32" else "highest")
    if job in ("compare", "dense") and configuration.dense_bytes > 0.8 * _free_bytes(configuration.device):
        result: dict[str, Any] = {"does_not_fit": True}
    elif job == "compare":
        result = compare(configuration, SIDES)
    elif job == "time":
        result = compare(configuration, ("sparse",))
    else:
        result = peak_memory(configuration, job)
    typer.echo(json.dumps(result))


def measure(configuration: Configuration) -> dict[str, Any]:
    """One row: both sides in turns, then each side's peak memory in a separate process."""

    def process(job: str) -> dict[str, Any]:
        task = json.dumps({"configuration": asdict(configuration), "doing": job})
        command = [sys.executable, __file__, "--worker", task]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        sys.stderr.write(finished.stderr)
        if finished.returncode == -9:  # killed for lack of memory
            return {"does_not_fit": True}
        if finished.returncode:
            raise RuntimeError(finished.stderr.strip().rpartition("\n")[2])
        return dict(json.loads(finished.stdout.splitlines()[-1]))

    row = asdict(configuration) | {"dense_needs_bytes": configuration.dense_bytes}
    both = process("compare")
    if both.get("does_not_fit"):
        return row | both | process("time") | process("sparse")
    return row | both | process("sparse") | process("dense")


def table(rows: list[dict[str, Any]]) -> Table:
    """Each side: ms of a step, then with Adam; thousands of tokens a second with Adam; GiB at the peak."""
    headings: tuple[str, ...] = ("L", "d", "F", "k", "tokens", "sparse ms", "+ Adam", "tok/s", "GiB", "of peak")
    headings += ("dense ms", "+ Adam", "tok/s", "GiB", "dense/sparse", "+ Adam", "gradients differ by")
    shown = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    for heading in headings:
        shown.add_column(heading, justify="right")
    for row in rows:
        cells = [f"{row[name]:,}" for name in ("layers", "width", "features", "k", "tokens")]
        cells += [*_side(row, "sparse"), f"{row['sparse_share_of_peak']:.0%}" if "sparse_seconds" in row else ""]
        cells += _side(row, "dense")
        if "dense_seconds" in row:
            cells += [f"{row[name]:.1f}" for name in ("dense_over_sparse", "dense_over_sparse_with_adam")]
            cells += [f"{row['gradient_difference']:.1e}"]
        shown.add_row(*cells)
    return shown


def _side(row: dict[str, Any], side: Side) -> list[str]:
    if f"{side}_seconds" not in row or f"{side}_peak_bytes" not in row:
        needed = f"{row['dense_needs_bytes'] / GIB:.1f}" if side == "dense" else ""
        return ["does not", "fit", "", needed]
    with_adam = row[f"{side}_seconds_with_adam"]
    return [
        f"{row[f'{side}_seconds'] * 1e3:,.0f}",
        f"{with_adam * 1e3:,.0f}",
        f"{row['tokens'] / with_adam:,.0f}",
        f"{row[f'{side}_peak_bytes'] / GIB:.2f}",
    ]


def main(
    dictionary: Annotated[
        Dictionary, typer.Option(help="What to train: a CLT, or SAEs after all layers but the last.")
    ] = "clt",
    shape: Annotated[Shape, typer.Option(help="L, d and F of a known CLT.")] = "demo",
    layers: Annotated[list[int] | None, typer.Option(help="L; repeat an option for a grid.")] = None,
    width: Annotated[list[int] | None, typer.Option(help="d.")] = None,
    features: Annotated[list[int] | None, typer.Option(help="F, number of features per layer.")] = None,
    k: Annotated[list[int] | None, typer.Option(help="Number of active features per token; default: 32.")] = None,
    tokens: Annotated[
        list[int] | None, typer.Option(help="Number of tokens per step; default: those of eight images.")
    ] = None,
    sparsifier: Annotated[Kind, typer.Option(help="Sparsifier, from activations to codes.")] = "relu_topk",
    pairs: Annotated[int, typer.Option(min=1, help="Number of timed pairs, after one that is not counted.")] = 5,
    device: Annotated[Device, typer.Option(help="Device to run on.")] = "cpu",
    matmul: Annotated[Matmul, typer.Option(help="Precision of matrix products.")] = "fp32",
    quick: Annotated[bool, typer.Option("--quick", help="Run four small configurations.")] = False,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file.")] = None,
    worker: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Time one training step, sparse against dense.

    Example: python loadtests/training_step.py --shape b32 --tokens 256 --pairs 3
    """
    if worker:
        _work(worker)
        return
    base = SHAPES[shape]
    axes = (layers or [base[0]], width or [base[1]], features or [base[2]], k or [32], tokens or [8 * base[3]])
    grid = QUICK if quick else tuple(itertools.product(*axes))
    console = Console()
    rows = []
    for numbers in track(grid, "configurations", console=console):
        rows.append(measure(Configuration(*numbers, pairs, device, matmul, sparsifier, dictionary)))
        if as_json:
            as_json.write_text(json.dumps(rows, indent=2))
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    console.print(f"{name}, {dictionary}, {sparsifier}, {matmul}, torch {torch.__version__}; medians of {pairs} pairs")
    console.print(table(rows))
    peaks = [(row["machine_tflops"], row["machine_gb_per_second"]) for row in rows if "machine_tflops" in row]
    tflops, bandwidth = max(peaks, default=(0.0, 0.0))
    console.print(
        f"Peak of this machine: {tflops:.2f} TFLOP/s in {matmul} products, {bandwidth:.0f} GB/s. 'of peak': time of "
        f"the sparse step as estimated by training.recipes.costs for this peak, over the measured time. 'gradients "
        f"differ by': largest difference, relative to the parameter's largest gradient. 'does not fit': GiB as "
        f"estimated before the run."
    )


if __name__ == "__main__":
    typer.run(main)
