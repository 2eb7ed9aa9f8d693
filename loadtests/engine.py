"""Cost of an account: our vision graph compared with plain CLIP and common explanation methods, in one paired run.

    python loadtests/engine.py --quick
    python loadtests/engine.py --shape b32 --features 6144 --features 24576 --batch 1 --batch 8 --pairs 20
    python loadtests/engine.py --shape b32 --scaling                     (over F, k, labels and targets)
    python loadtests/engine.py --shape b16 --json rows.json

Weights and pixels are random: speed does not depend on them. In each round every variant runs once, in random order,
on the same pixels; figures are medians, ratios are medians of the rounds' ratios to plain CLIP in the same ONNX
Runtime.

    plain, plain int8         CLIP's image encoder as an ONNX graph (with --device cuda: fp16 instead of int8)
    ledger, ledger int8       the same with all outputs that an account needs
    ledger, details           also with the outputs for heat maps and the lens
    account                   ledger, and the account of the top-1 among ten labels, in numpy
    account, heatmap          with a heat map
    torch                     open_clip's encode_image
    hooks                     the same with hooks on every MLP, and a CLT with dense decoders for all tokens
    input x gradient          Captum, of the top-1's logit
    integrated gradients      Captum, 50 steps

Graphs are kept in --cache between runs. This needs the training environment ('.[cpu,training,dev]').
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else torch's threads spin while ONNX Runtime runs

import vitrine  # noqa: F401  # first: it stops the libraries' telemetry

# isort: split
import numpy as np
import onnxruntime
import open_clip
import psutil
import torch
import typer
from captum.attr import InputXGradient, IntegratedGradients
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from vitrine.models.account.ledger import Decomposition
from vitrine.models.bundle.layout import (
    DETAILS_INPUT,
    EVERY_OUTPUT,
    MLP_ROWS,
    ON_REQUEST,
    VISION_OUTPUTS,
    Variant,
    given,
)
from vitrine.models.clip.tower import Tower
from vitrine.models.dictionary.clt import Architecture
from vitrine.models.dictionary.encoder import Encoder
from vitrine.models.dictionary.sparsify import make_sparsifier
from vitrine.models.graph.attribution import AttributionGraph
from vitrine.models.graph.onnx_file import save_onnx, to_onnx
from vitrine.models.graph.variants import make_variant, preselect
from vitrine.models.graph.vision import VisionGraph
from vitrine.models.precision.sessions import session_options
from vitrine.service.answers.explain import account
from vitrine.service.engine.labels import LabelSet
from vitrine.service.engine.processors import available_processors
from vitrine.service.engine.runtime import provider_options
from vitrine.service.operations.settings import Settings
from vitrine.service.schemas.attribute import Explain

Device = Literal["cpu", "cuda"]
Run = Callable[[], object]
VARIANTS: dict[Device, Variant] = {"cpu": "int8", "cuda": "fp16"}  # what is timed beside float32
QUICK: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 64, "patch_size": 8, "layers": 4, "width": 256, "head_width": 64},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
TINY: dict[str, Any] = QUICK | {
    "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 2, "width": 64, "head_width": 32}
}


class Shape(StrEnum):
    """Shape of a CLIP: open_clip's ViT-B-32 and ViT-B-16, and two small ones."""

    TINY = "tiny"
    QUICK = "quick"
    B32 = "b32"
    B16 = "b16"


SMALL = {Shape.TINY: TINY, Shape.QUICK: QUICK}
LOGIT_SCALE, STEPS = 100.0, 50


@dataclass(frozen=True)
class Case:
    shape: Shape
    features: int
    k: int
    batch: int


class RandomClt:
    """The parts of a CLT that `AttributionGraph` reads: no decoders, which only training and replacement need."""

    def __init__(self, layers: int, width: int, features: int, k: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.layers, self.width, self.features = layers, width, features
        self.architecture = Architecture(layers, width, features, (k,) * layers, (k,) * layers)
        self.encoders = [Encoder(width, make_sparsifier("relu_topk", features, k, k)) for _ in range(layers)]
        self.table = torch.randn(layers, features, width, generator=generator).mul_(0.02)
        for encoder in self.encoders:
            nn.init.normal_(encoder.weight, std=width**-0.5, generator=generator)
            nn.init.zeros_(encoder.bias)

    def directions(self) -> Tensor:
        return self.table

    def writers(self, target: int) -> Tensor:
        return self.table

    def decoder_biases(self) -> Tensor:
        return torch.zeros(self.layers, self.width)


class _Plain(nn.Module):
    """Pixels to unit embeddings, with open_clip's own modules."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.visual = visual

    def forward(self, pixels: Tensor) -> Tensor:
        return nn.functional.normalize(self.visual(pixels), dim=-1)


def load(shape: Shape) -> Any:
    """open_clip's model of this shape, with random weights."""
    torch.manual_seed(0)
    logging.disable(logging.WARNING)  # open_clip warns that there are no weights
    model = open_clip.CLIP(**SMALL[shape]) if shape in SMALL else open_clip.create_model(f"ViT-B-{shape[1:]}")
    return model.eval().requires_grad_(False)


def plain_graphs(cache: Path, shape: Shape, device: Device = "cpu") -> Path:
    """The folder of the plain graphs, exported if missing."""
    plain = cache / f"{shape}-plain"
    if not (plain / f"{VARIANTS[device]}.onnx").exists():
        plain.mkdir(parents=True, exist_ok=True)
        model = load(shape)
        _write(
            to_onnx(_Plain(model.visual).eval(), {"pixels": _example(model)}, ("embedding",)), plain, VARIANTS[device]
        )
    return plain


def graphs(cache: Path, shape: Shape, features: int, k: int, device: Device = "cpu") -> tuple[Path, Path]:
    """(folder of the plain graphs, folder of our graphs), exported if missing."""
    plain, ours = plain_graphs(cache, shape, device), cache / f"{shape}-{features}-{k}"
    if not (ours / f"{VARIANTS[device]}.onnx").exists():
        ours.mkdir(parents=True, exist_ok=True)
        model = load(shape)
        tower = Tower(model.visual)
        graph = VisionGraph(tower)
        if features:
            clt: Any = RandomClt(tower.layers, tower.width, features, k)
            graph = AttributionGraph(tower, clt, torch.zeros(tower.layers, tower.width), torch.float16)
            np.save(ours / "directions.npy", graph.directions.reshape(tower.layers, features, tower.width).numpy())
            np.save(ours / "last_decoders.npy", graph.last_decoders.numpy())
        np.save(ours / "fold.npy", torch.cat([graph.fold, graph.beta[None]]).numpy())
        np.save(ours / "attention.npy", tower.attention_fold().numpy())
        outputs = (graph.eval().always, ON_REQUEST, DETAILS_INPUT)
        _write(to_onnx(graph, {"pixels": _example(model)}, *outputs), ours, VARIANTS[device])
    return plain, ours


def _write(model: Any, folder: Path, variant: Variant) -> None:
    made = make_variant(model, variant)
    save_onnx(preselect(model), folder / "fp32.onnx")
    save_onnx(made, folder / f"{variant}.onnx")  # last: its presence marks the folder as complete


def _example(model: Any) -> Tensor:
    return torch.zeros(2, 3, *Tower(model.visual).image_size)


def session(path: Path, device: Device, threads: int) -> onnxruntime.InferenceSession:
    """An inference session as the service creates it."""
    options = session_options()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(path, options, providers=[*provider_options(Settings(provider=device)).items()])


class ExportedGraph:
    """The exported graph, and what the service computes from its outputs."""

    def __init__(self, folder: Path, file: str, pixels: NDArray[np.float32], device: Device, threads: int) -> None:
        self.session, self.pixels = session(folder / file, device, threads), pixels
        fold, directions = np.load(folder / "fold.npy"), folder / "directions.npy"
        self.has_features = directions.exists()
        self.tables: Any = SimpleNamespace(
            directions=np.load(directions, mmap_mode="r") if self.has_features else np.zeros((0, 0, len(fold) - 1)),
            attention_fold=np.load(folder / "attention.npy", mmap_mode="r"),
            fold=fold[:-1],
            beta=fold[-1],
            cards=None,
            manifest=SimpleNamespace(logit_scale=LOGIT_SCALE, preprocessing=SimpleNamespace(size=pixels.shape[2:])),
        )

    def graph(self, details: bool = False) -> list[Decomposition]:
        names = given(EVERY_OUTPUT if details else (*VISION_OUTPUTS, MLP_ROWS), self.has_features)
        feeds = {"pixels": self.pixels, DETAILS_INPUT: np.array(details)}
        outputs = dict(zip(names, self.session.run(names, feeds), strict=True))
        return [Decomposition.from_batch(outputs, image, details) for image in range(len(self.pixels))]

    def accounts(self, labels: int = 10, targets: int = 1, heatmap: bool = False) -> Run:
        """A call that explains `targets` of `labels` cached labels, for every image."""
        embeddings = np.random.default_rng(1).standard_normal((labels, self.tables.fold.shape[1]), np.float32)
        names = tuple(f"label {index}" for index in range(labels))
        label_set = LabelSet(names, embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True))
        explain = Explain(targets=list(names[:targets]) if targets > 1 else None, heatmap=heatmap)
        return lambda: [account(parts, label_set, self.tables, explain) for parts in self.graph(heatmap)]


def peers(model: Any, clt: RandomClt, pixels: NDArray[np.float32], device: Device) -> dict[str, Run]:
    """The usual explanation methods, in PyTorch."""
    model, x = model.to(device), torch.from_numpy(pixels).to(device)
    labels = nn.functional.normalize(torch.randn(10, model.visual.proj.shape[1], device=device), dim=-1)
    blocks = model.visual.transformer.resblocks
    encoders = [(encoder.weight.to(device), encoder.bias.to(device)) for encoder in clt.encoders]
    table, k = clt.table.to(device), clt.architecture.k[0]

    def logits(images: Tensor) -> Tensor:
        return LOGIT_SCALE * nn.functional.normalize(model.visual(images), dim=-1) @ labels.T

    def plain() -> Tensor:
        with torch.no_grad():
            return _wait(logits(x))

    def hooks() -> Tensor:
        """Every MLP's input and output by hooks; codes of all tokens; one dense product for each pair of layers."""
        captured: list[Tensor] = []
        handles = [block.ln_2.register_forward_hook(lambda _m, _i, out: captured.append(out)) for block in blocks]
        handles += [block.mlp.register_forward_hook(lambda _m, _i, out: captured.append(out)) for block in blocks]
        with torch.no_grad():
            logits(x)
            for handle in handles:
                handle.remove()
            codes = []
            for (weight, bias), mlp_in in zip(encoders, captured[::2], strict=True):
                preactivations = mlp_in.flatten(0, 1) @ weight.T + bias
                best = preactivations.topk(k, dim=-1)
                codes.append(torch.zeros_like(preactivations).scatter_(-1, best.indices, best.values.relu()))
            # one table per source replaces its decoders onto every target: the same products, less memory
            written = [sum(codes[i] @ table[i] for i in range(j + 1)) for j in range(len(blocks))]
            return _wait(torch.stack([torch.as_tensor(part) for part in written]))

    def attribute(method: Any, **options: Any) -> Run:
        explainer = method(logits)
        target = logits(x).argmax(-1)
        return lambda: _wait(explainer.attribute(x.clone().requires_grad_(), target=target, **options))

    def _wait(result: Tensor) -> Tensor:
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    return {
        "torch": plain,
        "hooks": hooks,
        "input x gradient": attribute(InputXGradient),
        "integrated gradients": attribute(IntegratedGradients, n_steps=STEPS),
    }


def rounds(runs: dict[str, Run], pairs: int, title: str) -> dict[str, list[float]]:
    """Milliseconds of every variant in every round, after one warm-up round.

    Each round has its own order: no variant always runs with the caches as the slowest one left them.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    chance = random.Random(0)  # noqa: S311
    for number in track(range(pairs + 1), title, transient=True):
        for name, run in chance.sample([*runs.items()], len(runs)):
            start = time.perf_counter()
            run()
            if number:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def rows(case: Case, times: dict[str, list[float]], base: str = "plain") -> Iterable[dict[str, Any]]:
    """One row per variant: {variant, shape, features, k, batch, median_ms, ratio_to_plain}."""
    for name, milliseconds in times.items():
        ratio = statistics.median(a / b for a, b in zip(milliseconds, times[base], strict=True))
        yield {"variant": name, **vars(case), "median_ms": statistics.median(milliseconds), "ratio_to_plain": ratio}


def compare(case: Case, cache: Path, pairs: int, threads: int, device: Device, slow: bool) -> list[dict[str, Any]]:
    """The rows of one case; `slow`: include the methods in PyTorch."""
    plain, ours = graphs(cache, case.shape, case.features, case.k, device)
    model = load(case.shape)
    pixels = np.random.default_rng(0).standard_normal((case.batch, *_example(model).shape[1:]), np.float32)
    runs: dict[str, Run] = {}
    variant = VARIANTS[device]
    for suffix, file in (("", "fp32.onnx"), (f" {variant}", f"{variant}.onnx")):
        baseline = session(plain / file, device, threads)
        runs[f"plain{suffix}"] = lambda baseline=baseline: baseline.run(["embedding"], {"pixels": pixels})  # type: ignore[misc]
        engine = ExportedGraph(ours, file, pixels, device, threads)
        runs[f"ledger{suffix}"] = engine.graph
        if not suffix:
            runs["ledger, details"] = lambda engine=engine: engine.graph(True)  # type: ignore[misc]
            runs["account"] = engine.accounts()
            runs["account, heatmap"] = engine.accounts(heatmap=True)
    if slow and case.features:
        torch.set_num_threads(threads)
        tower = Tower(model.visual)
        runs |= peers(model, RandomClt(tower.layers, tower.width, case.features, case.k), pixels, device)
    return list(rows(case, rounds(runs, pairs, f"{case.shape}, F = {case.features:,}, batch {case.batch}")))


def scale_labels(case: Case, cache: Path, pairs: int, threads: int, device: Device) -> list[dict[str, Any]]:
    """Rows for more labels and targets; ratios are relative to ten labels and one target."""
    _, ours = graphs(cache, case.shape, case.features, case.k, device)
    pixels = np.random.default_rng(0).standard_normal((case.batch, *_example(load(case.shape)).shape[1:]), np.float32)
    engine = ExportedGraph(ours, "fp32.onnx", pixels, device, threads)
    runs = {
        f"account, {labels:,} labels, {targets} target{'s' * (targets > 1)}": engine.accounts(labels, targets)
        for labels, targets in ((10, 1), (100, 1), (1000, 1), (10, 10), (1000, 32))
    }
    return list(rows(case, rounds(runs, pairs, "labels and targets"), base=next(iter(runs))))


def memory(cache: Path, case: Case, threads: int, device: Device) -> dict[str, Any]:
    """Peak resident memory of a process that only loads and runs our graph on the CPU, and the size of its weights."""
    _, ours = graphs(cache, case.shape, case.features, case.k, device)
    side = _example(load(case.shape)).shape[-1]
    code = (
        "import numpy as np, onnxruntime as o, sys\n"
        "options = o.SessionOptions(); options.intra_op_num_threads = int(sys.argv[2])\n"
        "session = o.InferenceSession(sys.argv[1], options, providers=['CPUExecutionProvider'])\n"
        f"feeds = {{'pixels': np.zeros(({case.batch}, 3, {side}, {side}), np.float32), 'details': np.array(False)}}\n"
        "for _ in range(5): session.run(None, feeds)\n"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))\n"
    )
    command = [sys.executable, "-c", code, str(ours / "fp32.onnx"), str(threads)]
    peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) * 1024  # noqa: S603
    files = [ours / file for file in ("fp32.onnx.data", "directions.npy", "last_decoders.npy")]
    return {
        "variant": "memory",
        **vars(case),
        "weights_bytes": sum(file.stat().st_size for file in files if file.exists()),
        "peak_bytes": peak,
    }


def show(console: Console, results: list[dict[str, Any]]) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("variant", "shape", "F", "k", "batch", "median, ms", "ratio"):
        table.add_column(heading, justify="left" if heading in ("variant", "shape") else "right")
    for row in results:
        numbers = (f"{row['features']:,}", str(row["k"]), str(row["batch"]), f"{row['median_ms']:.2f}")
        table.add_row(row["variant"], row["shape"], *numbers, f"{row['ratio_to_plain']:.3f}")
    console.print(table)


def report(found: list[dict[str, Any]], threads: int, json_file: Path | None) -> None:
    """Print rows with what they took, and write them to a file if there is one."""
    console = Console()
    show(console, found)
    console.print(f"{threads} threads; resident memory {psutil.Process().memory_info().rss / 1e9:.2f} GB")
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=1))


def main(
    shape: Annotated[list[Shape], typer.Option(help="Shape of the CLIP (repeatable).")] = [Shape.B32],  # noqa: B006
    features: Annotated[list[int], typer.Option(help="F, features per layer; 0: no CLT (repeatable).")] = [6144],  # noqa: B006
    k: Annotated[list[int], typer.Option(help="Number of active features (repeatable).")] = [32],  # noqa: B006
    batch: Annotated[list[int], typer.Option(help="Number of images per batch (repeatable).")] = [1, 8],  # noqa: B006
    pairs: Annotated[int, typer.Option(min=1, help="Rounds.")] = 20,
    threads: Annotated[int, typer.Option(help="Threads of one inference; 0: all that this process may use.")] = 0,
    device: Annotated[Device, typer.Option(help="Device to run on.")] = "cpu",
    peers_at: Annotated[int, typer.Option(help="Largest batch for the variants in PyTorch; 0: leave them out.")] = 1,
    scaling: Annotated[bool, typer.Option(help="Also vary F, k, labels and targets.")] = False,
    quick: Annotated[bool, typer.Option(help="Use a small shape and few rounds: within a minute.")] = False,
    cache: Annotated[Path, typer.Option(help="Folder in which exported graphs are kept.")] = Path("build/engine"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file.")] = None,
) -> None:
    """Run one paired comparison; see the top of this file."""
    console = Console()
    if quick:
        shape, features, k, batch, pairs = [Shape.QUICK], [1024], [16], [1, 8], 5
    threads = threads or available_processors()[0]
    results: list[dict[str, Any]] = []
    for case in itertools.starmap(Case, itertools.product(shape, features, k, batch)):
        case_rows = compare(case, cache, pairs, threads, device, slow=case.batch <= peers_at)
        show(console, case_rows)
        results += case_rows
    if scaling:
        for size, budget in ((1536, 32), (6144, 16), (6144, 32), (6144, 64), (24576, 32)):
            case = Case(shape[0], size, budget, 1)
            case_rows = compare(case, cache, pairs, threads, device, slow=False)
            results += case_rows
            show(console, case_rows)
    first = Case(shape[0], features[0], k[0], 1)
    labels = scale_labels(first, cache, pairs, threads, device)
    show(console, labels)
    usage = memory(cache, first, threads, device)
    console.print(
        f"memory: {usage['peak_bytes'] / 2**20:,.0f} MiB for {usage['weights_bytes'] / 2**20:,.0f} MiB of weights"
    )
    if json_file:
        json_file.write_text(json.dumps([*results, *labels, usage], indent=1))


if __name__ == "__main__":
    typer.run(main)
