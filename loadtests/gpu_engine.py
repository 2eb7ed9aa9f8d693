"""For gpu_steps.py: the engine on a GPU compared with the one on the CPU: answers and times."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import vitrine  # noqa: F401  # first: it stops the libraries' telemetry

# isort: split
import numpy as np
import onnxruntime
from numpy.typing import NDArray

from corpus import drawn_images
from engine import Case, Device, Run, Shape, rounds, rows, session
from vitrine.models.account.ledger import ledger, logits
from vitrine.models.account.sources import Sources, accounts
from vitrine.models.bundle.bundle import Bundle, open_bundle
from vitrine.models.bundle.layout import Precision, vision_file
from vitrine.models.images.decode import TRUSTED, decode
from vitrine.models.images.frame import to_pixels
from vitrine.models.precision.agreement import measure
from vitrine.models.precision.sessions import session_options
from vitrine.service.answers.explain import account
from vitrine.service.engine.engine import Engine
from vitrine.service.engine.labels import LabelEncoder, LabelSet
from vitrine.service.engine.runtime import PROVIDERS, choose
from vitrine.service.operations.settings import Settings
from vitrine.service.schemas.attribute import Explain

PICTURES, TRACED, AT_ONCE = 32, 4, 8
Row = dict[str, Any]


def pictures(bundle: Bundle, count: int) -> NDArray[np.float32]:
    """Normalised pixels [count, 3, H, W] of the load tests' drawn pictures."""
    files = (decode(file, TRUSTED).image for file in drawn_images(count))
    return np.stack([to_pixels(image, bundle.manifest.preprocessing, TRUSTED) for image in files])


def precisions(bundle: Bundle, provider: str) -> tuple[Precision, ...]:
    """Those of a bundle that a provider may run."""
    of_others = "fp16" if provider == "cpu" else "int8"
    return tuple(name for name in bundle.manifest.precisions if name != of_others)


def load(bundle: Bundle, provider: Any, precision: Precision, tf32: bool = True, cache: Path | None = None) -> Engine:
    """An engine as the service has it; tf32: False takes TensorFloat-32 from CUDA, which has it unless told otherwise.

    cache: of TensorRT. Raises `EngineError` if the provider cannot be used.
    """
    settings = Settings(
        bundle=bundle.path, provider=provider, precision=precision, batch_size=PICTURES, tensorrt_cache=cache
    )
    runtime, cuda = choose(bundle, settings), PROVIDERS["cuda"]
    if not tf32:
        runtime = replace(runtime, options={**runtime.options, cuda: {**runtime.options[cuda], "use_tf32": 0}})
    return Engine(bundle, settings, runtime)


def parity(path: Path, provider: Any, cache: Path | None = None) -> Iterator[Row]:
    """A row for every graph that a provider may run: how far its answers are from those of float32 on the CPU.

    logit, row, remainder: the largest differences of a logit, of a row of the top-1's ledger, and of the sum of the
    rows to the logit; sources: the largest difference of a part of the top-1's source account, features and errors
    summed by layer; all in logits.
    """
    bundle = open_bundle(path)
    reference, text = load(bundle, "cpu", "fp32"), bundle.manifest.text
    labels = LabelEncoder(reference, 1).encode(text.labels, text.templates)
    pixels = pictures(bundle, PICTURES)
    batches = [pixels[start : start + AT_ONCE] for start in range(0, len(pixels), AT_ONCE)]
    for precision in precisions(bundle, provider):
        for tf32 in (False, True) if precision == "fp32" and provider == "cuda" else (True,):
            engine = load(bundle, provider, precision, tf32, cache)
            agreement = measure(reference.vision, engine.vision, batches, labels, bundle.directions, bundle.fold)
            yield {
                "bundle": bundle.manifest.name,
                "provider": engine.provider,
                "precision": precision,
                "tf32": tf32 and precision == "fp32" and provider != "cpu",
                "images": len(pixels),
                **_differences(reference, engine, batches, labels),
                "sources": _sources(reference, engine, pixels[:TRACED], labels) if precision == "fp32" else None,
                **agreement.model_dump(include={"top1", "ledger_cosine", "top_features", "drawn_cosine"}),
                "nodes": nodes(bundle.path / vision_file(precision), engine),
            }


def _differences(
    reference: Engine, engine: Engine, batches: list[NDArray[np.float32]], labels: NDArray[np.float32]
) -> dict[str, float]:
    scale, worst = reference.bundle.manifest.logit_scale, {"logit": 0.0, "row": 0.0, "remainder": 0.0}
    for pixels in batches:
        for expected, actual in zip(reference.explain(pixels), engine.explain(pixels), strict=True):
            were, are = (logits(parts.embedding, labels, scale) for parts in (expected, actual))
            target = labels[were.argmax()]
            found = {
                "logit": np.abs(were - are).max(),
                "row": scale * np.abs((expected.rows - actual.rows) @ target).max(),
                "remainder": abs(ledger(actual, target, scale).remainder),
            }
            worst = {name: max(value, float(found[name])) for name, value in worst.items()}
    return worst


def _sources(
    reference: Engine, engine: Engine, pixels: NDArray[np.float32], labels: NDArray[np.float32]
) -> float | None:
    """The largest difference of a part; None: the bundle has no source accounts."""
    if reference.sources is None or engine.sources is None:
        return None
    worst = 0.0
    for image in pixels:
        top1 = logits(reference.explain(image[None])[0].embedding, labels, 1.0).argmax()
        expected, actual = (_parts(_source_account(one, image, labels[top1])) for one in (reference, engine))
        worst = max(worst, float(np.abs(expected - actual).max()))
    return worst


def _source_account(engine: Engine, image: NDArray[np.float32], label: NDArray[np.float32]) -> Sources:
    """Of one image [3, H, W] and the unit embedding [D] of a label."""
    assert engine.sources is not None
    made = engine.sources.run(image, label[None])
    (found,) = accounts(*made, label[None], engine.bundle.beta, engine.bundle.manifest.logit_scale)
    return found


def _parts(found: Sources) -> NDArray[np.floating]:
    """What two accounts have in common, whichever features are active at the edge of a choice."""
    by_layer = [found.features.sum((1, 2)), found.errors.sum(1), found.biases]
    return np.concatenate([[found.logit, found.constants], found.embeddings, *by_layer])


def nodes(graph: Path, engine: Engine) -> dict[str, Any]:
    """How many nodes of a graph run where, and what those do that are not on the engine's provider.

    A node on another provider costs two copies. Those that only handle shapes belong on the CPU.
    """
    options = session_options()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    providers = [*engine.runtime.options.items()]
    placed = onnxruntime.InferenceSession(graph, options, providers=providers).get_provider_graph_assignment_info()
    counts: dict[str, int] = {}
    elsewhere: dict[str, int] = {}
    for part in placed:
        for node in part.get_nodes():
            counts[part.ep_name] = counts.get(part.ep_name, 0) + 1
            if part.ep_name != engine.provider:
                elsewhere[node.op_type] = elsewhere.get(node.op_type, 0) + 1
    return {"counts": counts, "elsewhere": elsewhere}


def timings(
    path: Path, cache: Path, shape: Shape, provider: Device, batches: tuple[int, ...], pairs: int
) -> Iterator[Row]:
    """Rows of milliseconds a batch, through the service's engine, beside plain CLIP in the same precision.

    plain           CLIP's image encoder as an ONNX graph
    ledger          the engine's pass with all that an account needs
    attribution     and the account of the top-1 among ten labels, in numpy
    sources         source accounts of the top-1, of one image after the other, as the service makes them; in float32
    """
    bundle = open_bundle(path)
    for precision in precisions(bundle, provider):
        engine, plain = load(bundle, provider, precision), cache / f"{shape}-plain" / f"{precision}.onnx"
        if not plain.exists():
            continue
        baseline = session(plain, provider, engine.runtime.threads)
        for batch in batches:
            case = Case(shape, bundle.manifest.shape.features, bundle.manifest.shape.k, batch)
            pixels = pictures(bundle, batch)
            runs: dict[str, Run] = {"plain": partial(baseline.run, ["embedding"], {"pixels": pixels})}
            runs |= _runs(engine, pixels, precision == "fp32")
            for row in rows(case, rounds(runs, pairs, f"{precision}, batch {batch}")):
                yield {"provider": engine.provider, "precision": precision, **row}


def _runs(engine: Engine, pixels: NDArray[np.float32], sources: bool) -> Mapping[str, Run]:
    bundle, text = engine.bundle, engine.bundle.manifest.text
    labels: LabelSet = LabelEncoder(engine, 1).label_set(text.labels, text.templates)

    def attribution() -> object:
        return [account(parts, labels, bundle, Explain()) for parts in engine.explain(pixels)]

    def traced() -> object:
        return [_source_account(engine, image, labels.embeddings[0]).by_feature() for image in pixels]

    runs: dict[str, Run] = {"ledger": partial(engine.explain, pixels), "attribution": attribution}
    return runs | ({"sources": traced} if sources and engine.sources is not None else {})
