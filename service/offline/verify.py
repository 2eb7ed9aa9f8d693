"""Verify a bundle: its files, that its graphs run and their rows add up, and that its cards can be read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account.circuit import Wanted
from vitrine.models.account.ledger import Decomposition
from vitrine.models.account.sources import accounts
from vitrine.models.bundle.bundle import Bundle, BundleError, open_bundle
from vitrine.models.bundle.layout import CARDS, RERUN, RESIDUAL_TRACE, Dictionary, vision_file
from vitrine.models.interventions.changes import resolve
from vitrine.models.interventions.edit_files import bundle_edits, changes_of
from vitrine.models.interventions.network import BundleNetwork
from vitrine.models.interventions.spec import Intervention, Row
from vitrine.service.answers.attention import score_accounts
from vitrine.service.engine.engine import Engine
from vitrine.service.engine.fit import check_unit
from vitrine.service.engine.labels import LabelEncoder
from vitrine.service.engine.rerun import RerunGraphs
from vitrine.service.engine.residual import ResidualGraphs
from vitrine.service.engine.runtime import choose, session_errors
from vitrine.service.engine.sources import SourceGraphs
from vitrine.service.operations.settings import load_settings
from vitrine.service.schemas.attention import HeadQuestion

TOLERANCE = 1e-4  # of unit embeddings
REMAINDER = 1e-3  # of source accounts, in logits, and of attention scores
CARDS_PER_LAYER = 4  # cards read per layer
DIRECTIONS = 4  # in embedding space, whose source accounts are checked


def verify(path: Path) -> Bundle:
    """The opened bundle. Raises `BundleError`, `EngineError` or `EditError` for the first error in it."""
    bundle = open_bundle(path)
    # before the graphs, whose errors for a damaged table are less clear
    _ = bundle.directions, bundle.fold, bundle.attention_fold, bundle.baseline, bundle.label_sets
    _ = bundle.encoders
    every = dict.fromkeys(("replacement", "sources", "residual", "rerun"), True)
    settings = load_settings().model_copy(update=every)
    runtime = choose(bundle, settings.model_copy(update={"provider": "cpu", "precision": "fp32"}))
    for precision in bundle.manifest.precisions:
        engine = Engine(bundle, settings, replace(runtime, precision=precision))
        with session_errors(bundle.path / vision_file(precision)):
            _check_sums(engine)
    encoder, text = LabelEncoder(engine, capacity=1), bundle.manifest.text
    file = bundle.path / "text.onnx"
    with session_errors(file):
        check_unit(encoder.encode(text.labels, text.templates), f"{file}: the embedding of a label")
    for dictionary in CARDS:
        _check_cards(bundle, dictionary)
    if edits := bundle_edits(bundle):
        network = BundleNetwork(bundle)
        for edit in edits.values():
            changes_of(edit, bundle, network)
    return bundle


def _check_sums(engine: Engine) -> None:
    """That rows and source accounts add up, and that the replacement graph replaces nothing where it should not."""
    bundle = engine.bundle
    pixels = np.random.default_rng(0).standard_normal((2, 3, *bundle.manifest.preprocessing.size), np.float32)
    decompositions = engine.explain(pixels)
    for parts in decompositions:
        deviation = float(np.abs(parts.rows.sum(0) - parts.embedding).max())
        if not deviation <= TOLERANCE:
            file = vision_file(engine.runtime.precision)
            raise BundleError(
                f"{bundle.path}: the rows of {file} differ from its embedding by {deviation:.1e}; export the bundle "
                "again"
            )
    if engine.runtime.precision != "fp32":
        return
    if engine.replacement is not None:  # first: the graphs below read its decoders
        embeddings, _ = engine.replacement.run(pixels, np.zeros((bundle.manifest.shape.layers, 2), bool))
        deviation = float(np.abs(embeddings - np.stack([parts.embedding for parts in decompositions])).max())
        if not deviation <= TOLERANCE:
            raise BundleError(
                f"{bundle.path}: with nothing replaced, the embedding of replacement.onnx differs from that of "
                f"vision.onnx by {deviation:.1e}; export the bundle again"
            )
    if engine.sources is not None:
        _check_source_accounts(engine.sources, pixels[0], decompositions[0])
        if bundle.has_scores:
            _check_attention_scores(engine.sources, pixels[0])
    if engine.rerun is not None:
        _check_rerun(engine.rerun, pixels, decompositions)
    if engine.residual is not None:
        _check_residual_accounts(engine.residual, pixels[0], decompositions[0])


def _check_rerun(graphs: RerunGraphs, pixels: NDArray[np.float32], decompositions: list[Decomposition]) -> None:
    """That with nothing changed the graph is of the same network, and that with something changed its rows add up."""
    graphs.check()
    network = BundleNetwork(graphs.bundle)
    row: Row = "clt" if graphs.bundle.manifest.has_features else "mlp"
    for items in ([], [Intervention(op="ablate", layer=0, row=row, tokens="all")]):
        changes = resolve(items, network, "rerun")
        for parts, own in zip(graphs.run(pixels, [changes] * len(pixels)), decompositions, strict=True):
            deviation = float(np.abs(parts.rows.sum(0) - (parts if items else own).embedding).max())
            if not deviation <= TOLERANCE:
                raise BundleError(
                    f"{graphs.bundle.path}: the rows of {RERUN} differ from the embedding by {deviation:.1e}; export "
                    "the bundle again"
                )


def _check_source_accounts(graphs: SourceGraphs, pixels: NDArray[np.float32], parts: Decomposition) -> None:
    """That the trace is of the same network, and source accounts add up."""
    bundle = graphs.bundle
    directions = np.eye(bundle.manifest.shape.embedding, dtype=np.float32)[:DIRECTIONS]
    trace, outputs = graphs.run(pixels, directions)
    deviation = float(np.abs(trace.embedding - parts.embedding).max())
    if not deviation <= TOLERANCE:
        raise BundleError(
            f"{bundle.path}: the embedding of trace.onnx differs from that of vision.onnx by {deviation:.1e}; export "
            "the bundle again"
        )
    found = accounts(trace, outputs, directions, bundle.beta, bundle.manifest.logit_scale)
    worst = max(abs(sources.remainder) for sources in found)
    if not worst <= REMAINDER:
        raise BundleError(
            f"{bundle.path}: the source accounts of sources.onnx differ from the logit by {worst:.1e}; export the "
            "bundle again"
        )


def _check_residual_accounts(graphs: ResidualGraphs, pixels: NDArray[np.float32], parts: Decomposition) -> None:
    """That the trace is of the same network, and what flows into logits and into the most active features of every
    layer adds up to them."""
    bundle = graphs.bundle
    trace = graphs.trace(pixels)
    deviation = float(np.abs(trace.embedding - parts.embedding).max())
    if not deviation <= TOLERANCE:
        raise BundleError(
            f"{bundle.path}: the embedding of {RESIDUAL_TRACE} differs from that of vision.onnx by {deviation:.1e}; "
            "export the bundle again"
        )
    assert trace.indices is not None
    assert trace.values is not None
    found = graphs.of_directions(trace, np.eye(bundle.manifest.shape.embedding, dtype=np.float32)[:DIRECTIONS])
    for layer, (indices, values) in enumerate(zip(trace.indices, trace.values, strict=True)):
        tokens, places = np.unravel_index(np.argsort(-np.abs(values.ravel()))[:DIRECTIONS], values.shape)
        layers, activations = np.full(len(tokens), layer), values[tokens, places]
        found += graphs.of_features(trace, Wanted(layers, tokens, indices[tokens, places], activations))
    worst = max(abs(sources.remainder) for sources in found)
    if not worst <= REMAINDER:
        raise BundleError(
            f"{bundle.path}: the accounts by residual SAEs differ from what they explain by {worst:.1e}; export the "
            "bundle again"
        )


def _check_attention_scores(graphs: SourceGraphs, pixels: NDArray[np.float32]) -> None:
    """That the scores of some heads are those of the trace's attention weights, and their accounts add up."""
    bundle, trace = graphs.bundle, graphs.trace(pixels)
    layers, heads = trace.weights.shape[:2]
    for layer, head in ((0, 0), (layers // 2, heads // 2), (layers - 1, heads - 1)):
        for relative in (False, True):
            asked = HeadQuestion(layer=layer, head=head, relative=relative)
            score, *sides = score_accounts(graphs, trace, asked)
            weights = np.exp(score.scores - score.scores.max())
            deviation = float(np.abs(weights / weights.sum() - score.weights).max())
            if not deviation <= TOLERANCE:
                raise BundleError(
                    f"{bundle.path}: the scores of scores.onnx differ from the attention weights of trace.onnx by "
                    f"{deviation:.1e} (layer {layer}, head {head}); export the bundle again"
                )
            worst = max(abs(sources.remainder) for sources in sides)
            if not worst <= REMAINDER:
                raise BundleError(
                    f"{bundle.path}: the account of an attention score differs from the score by {worst:.1e} (layer "
                    f"{layer}, head {head}); export the bundle again"
                )


def _check_cards(bundle: Bundle, dictionary: Dictionary) -> None:
    """Read some cards of every layer, with their images, and count the labels."""
    cards, summary = bundle.cards_of(dictionary), bundle.manifest.cards_of(dictionary)
    if cards is None or summary is None:
        return
    from vitrine.models.bundle.cards import CardsError  # imports DuckDB, which a bundle without cards does not need

    try:
        for layer, features in enumerate(bundle.manifest.features_of(dictionary)):
            for index in range(0, features, max(1, features // CARDS_PER_LAYER)):
                cards.images([exemplar.image for exemplar in cards.card(layer, index).exemplars])
        labelled, _ = cards.search(None, None, 0, 1)
    except CardsError as error:
        raise BundleError(str(error)) from error
    if labelled != summary.quality.labelled:
        raise BundleError(
            f"{cards.path}: {labelled:,} cards have a label, but the manifest says {summary.quality.labelled:,}; make "
            "the cards again"
        )
