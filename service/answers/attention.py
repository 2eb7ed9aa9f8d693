"""Why an attention head looks where it does: what may be asked, and the answer, computed between other work."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account.attention_score import AttentionScore, Pair, Starts, feature_parts, largest, pairs
from vitrine.models.account.sources import Sources, Trace
from vitrine.models.bundle.bundle import Bundle
from vitrine.models.bundle.manifest import patch_grid
from vitrine.service.answers.attributor import Attributor
from vitrine.service.answers.sources import source_answer
from vitrine.service.engine.engine import Engine
from vitrine.service.engine.sources import SourceGraphs
from vitrine.service.errors import ServiceError
from vitrine.service.schemas.attention import AttentionAccount, HeadQuestion, PairFeature, ScorePair

BATCH = 16  # directions followed back at once, between other requests' batches


def attention_heads(engine: Engine) -> int:
    """Heads of a layer that `explain.attention` may name; 0: there are no accounts of attention scores."""
    return engine.heads if engine.sources is not None and engine.bundle.has_scores else 0


def check_attention(asked: HeadQuestion, engine: Engine) -> None:
    """Raise `ServiceError` invalid_request if this bundle cannot say why a head looks there, or has no such head."""
    bundle, shape = engine.bundle, engine.bundle.manifest.shape
    heads = attention_heads(engine)
    if not heads:
        reason = f"the bundle {bundle.manifest.name!r} has no source graphs; export it with `bundle.sources`"
        if bundle.has_sources:
            reason = (
                f"the bundle {bundle.manifest.name!r} is from a version without accounts of attention; export it again"
            )
        if bundle.has_scores:
            reason = "VITRINE_SOURCES=false switches them off"
        raise ServiceError("invalid_request", f"`explain.attention` cannot be answered: {reason}")
    for name, number, count in (
        ("layer", asked.layer, shape.layers),
        ("head", asked.head, heads),
        ("query", asked.query, shape.tokens),
        ("key", asked.key, shape.tokens),
    ):
        if number is not None and number >= count:
            raise ServiceError(
                "invalid_request",
                f"`explain.attention.{name}` is {number:,}; this CLIP allows 0 to {count - 1:,}",
            )


async def attention_account(
    attributor: Attributor, pixels: NDArray[np.float32], trace: Trace | None, asked: HeadQuestion
) -> AttentionAccount:
    """The account of one score of one image [3, H, W]. trace: the image's, if it is known."""
    graphs, bundle, run_between = attributor.engine.sources, attributor.bundle, attributor.batcher.run_between
    assert graphs is not None  # see `check_attention`
    await attributor.open(graphs)
    trace = trace or await run_between(graphs.trace, pixels, spent=0.0)
    score, of_query, of_key = await run_between(score_accounts, graphs, trace, asked, spent=0.0)
    found = await _pairs(attributor, graphs, trace, score, _listed(of_query, asked), asked)
    return await attributor.in_thread(_answer, bundle, trace, score, of_query, of_key, found, asked)


def score_accounts(graphs: SourceGraphs, trace: Trace, asked: HeadQuestion) -> tuple[AttentionScore, Sources, Sources]:
    """(score, the query's account, the key's)."""
    score = graphs.attention_score(trace, asked.layer, asked.head, asked.query, asked.key, asked.relative)
    of_query, of_key = (
        account(trace, graphs.of_reads(trace, asked.layer, starts))
        for account, starts in (
            (score.query_account, score.query_start()),
            (score.key_account, score.key_start()),
        )
    )
    return score, of_query, of_key


def _listed(of_query: Sources, asked: HeadQuestion) -> list[tuple[int, int]]:
    """(layer, index) of the query's features whose pairs are asked for."""
    if not asked.pairs:
        return []
    layers, indices, _ = (part[: asked.features].tolist() for part in of_query.by_feature())
    return list(zip(layers, indices, strict=True))


async def _pairs(
    attributor: Attributor,
    graphs: SourceGraphs,
    trace: Trace,
    score: AttentionScore,
    queries: list[tuple[int, int]],
    asked: HeadQuestion,
) -> list[Pair]:
    """The largest pairs of these features of the query, a batch of directions at a time."""
    if not queries:
        return []
    spent = 2.0  # the two accounts

    async def follow(starts: Starts, read: Any) -> Any:
        """`read` of the outputs of sources.onnx."""
        nonlocal spent
        result = await attributor.batcher.run_between(
            lambda: read(graphs.of_reads(trace, asked.layer, starts)), spent=spent
        )
        spent += len(starts.directions)
        return result

    rows, parts = score.query_row_starts(), []
    for first in range(0, len(rows.directions), BATCH):
        batch = Starts(rows.directions[first : first + BATCH], rows.token)
        parts.append(await follow(batch, lambda outputs: feature_parts(trace, outputs, queries)))
    of_queries, found = np.concatenate(parts, axis=1), list[Pair]()
    for first in range(0, len(queries), BATCH):
        some = queries[first : first + BATCH]
        starts = score.key_starts(of_queries[first : first + BATCH])
        found += await follow(starts, lambda outputs, some=some: pairs(trace, outputs, some, asked.pairs))
    return largest(found, asked.pairs)


def _answer(
    bundle: Bundle,
    trace: Trace,
    score: AttentionScore,
    of_query: Sources,
    of_key: Sources,
    found: list[Pair],
    asked: HeadQuestion,
) -> AttentionAccount:
    scores = score.scores
    rows, columns = patch_grid(bundle.manifest.preprocessing, len(scores) - 1)
    sides = [
        source_answer(sources, trace, bundle, asked.features, layers=asked.layer) for sources in (of_query, of_key)
    ]
    return AttentionAccount(
        layer=asked.layer,
        head=asked.head,
        query=score.query,
        key=score.key,
        weight=score.weight,
        score=float(scores[score.key]),
        mean_score=float(scores.mean()),
        relative=score.relative,
        explained=score.total,
        of_query=sides[0],
        of_key=sides[1],
        pairs=[
            ScorePair(
                query=_feature(bundle, *pair.query), key=_feature(bundle, *pair.key), contribution=pair.contribution
            )
            for pair in found
        ],
        other_pairs=score.total - sum(pair.contribution for pair in found),
        weights=score.weights.tolist(),
        rows=rows,
        columns=columns,
    )


def _feature(bundle: Bundle, layer: int, index: int) -> PairFeature:
    label, _ = bundle.cards.label(layer, index) if bundle.cards else (None, None)
    return PairFeature(layer=layer, index=index, label=label)
