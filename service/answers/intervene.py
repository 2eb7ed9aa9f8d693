"""Predictions and their account before and after interventions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account.ledger import Decomposition
from vitrine.models.bundle.layout import RERUN, RESIDUAL
from vitrine.models.interventions import direct
from vitrine.models.interventions.changes import Changes, InterventionError, resolve
from vitrine.models.interventions.spec import Intervention
from vitrine.service.answers.answer_size import attribution_values, check_answer_size
from vitrine.service.answers.attribute import all_warnings, attribute_image
from vitrine.service.answers.attributor import Attributor
from vitrine.service.answers.changes import Before, compared
from vitrine.service.answers.counterfactual import search
from vitrine.service.answers.explain import check_explain
from vitrine.service.answers.texts import Texts
from vitrine.service.engine.engine import Engine
from vitrine.service.errors import ServiceError
from vitrine.service.operations.stages import timed_stage
from vitrine.service.schemas.attribute import AttributeRequest, Explain
from vitrine.service.schemas.intervene import (
    Counterfactual,
    InterveneRequest,
    InterveneResponse,
    Variant,
)

FEATURE_VALUES = 7  # of a `FeatureChange`


class Asked(NamedTuple):
    """A request, checked."""

    attribute: AttributeRequest  # what `before` answers
    texts: Texts
    variants: list[list[Intervention]]
    counterfactual: Counterfactual | None


async def answer_intervene(
    attributor: Attributor, image: bytes, request: InterveneRequest, request_id: str
) -> InterveneResponse:
    """Before, after and the difference. Raises `ServiceError`."""
    asked, timings = check_intervene(attributor, request), dict[str, float]()
    with attributor.admit():
        changes = await attributor.in_thread(_resolved, attributor, asked.variants, request)
        await attributor.check_labels(asked.texts, request.strict)
        is_direct = request.mode == "direct" and not all(one.nothing for one in changes)
        heads = any(np.any(one.heads != 1) for one in changes)
        answer, inferred = await attribute_image(
            attributor, image, asked.attribute, *asked.texts, details=is_direct and heads, components=is_direct
        )
        before, found = Before(answer, inferred.parts, inferred.labels), None
        with timed_stage("interventions", timings):
            if asked.counterfactual is not None:
                await _open(attributor, asked.counterfactual)
                found, edits, parts = await search(attributor, inferred, asked.counterfactual)
                outcomes = [] if parts is None else [(edits, parts)]
            else:
                after = await _after(attributor, inferred.parts, inferred.pixels, changes, request)
                outcomes = list(zip(asked.variants, after, strict=True))
            results = [
                await attributor.in_thread(_variant, attributor, before, edits, parts, asked.attribute)
                for edits, parts in outcomes
            ]
    return InterveneResponse(
        request_id=request_id,
        model=attributor.model,
        warnings=all_warnings(inferred, answer),
        mode="rerun" if asked.counterfactual else request.mode,
        before=answer,
        results=results,
        counterfactual=found,
        timings_ms=timings,
    )


def check_intervene(attributor: Attributor, request: InterveneRequest) -> Asked:
    """What is asked. Raises `ServiceError` for what this bundle or these settings do not provide."""
    settings, texts, wanted = attributor.settings, attributor.texts(request), request.counterfactual
    variants = [] if wanted else [request.edits] if request.variants is None else request.variants
    explain = Explain(**request.explain.model_dump())
    check_explain(explain, texts[0], settings.max_targets, attributor.engine)
    most, counted = settings.max_interventions, sum(map(len, variants))
    if max(counted, len(variants)) > most:
        asked_for = f"there are {counted:,} interventions in {len(variants):,} variants"
        raise ServiceError(
            "invalid_request",
            f"{asked_for}; at most {most:,} of either are made per request",
        )
    if isinstance(wanted, str):
        wanted = Counterfactual(label=wanted)
    if wanted is not None:
        _check_counterfactual(attributor, wanted, texts, most)
    elif request.mode == "rerun" and counted:
        residual = any(item.dictionary == "residual" for edits in variants for item in edits)
        check_rerun("`mode` rerun", attributor.engine, residual=residual)
    elif counted and not attributor.engine.has_components:
        raise ServiceError(
            "invalid_request",
            f"the bundle {attributor.model.name!r} is from a version without interventions; export it again",
        )
    asked = AttributeRequest(**request.model_dump(include=set(AttributeRequest.model_fields) - {"explain"}))
    asked = asked.model_copy(update={"explain": explain})
    manifest = attributor.bundle.manifest
    values = (1 + 2 * len(variants or (wanted,))) * attribution_values(manifest, asked, len(texts[0]))
    check_answer_size(values, settings.max_answer_values, "request fewer variants, targets or features")
    return Asked(asked, texts, variants, wanted)


def check_rerun(asked: str, engine: Engine, *, residual: bool = False) -> None:
    """Raise `ServiceError` invalid_request if the network cannot be run with changes. asked: what needs that.

    residual: of features of residual SAEs.
    """
    files, name = engine.bundle.manifest.files, f"{RESIDUAL if residual else ''}{RERUN}"
    if engine.rerun is None or (residual and name not in files):
        reason = f"it has no {name}; export it again"
        if name in files:
            reason = "VITRINE_RERUN=false switches it off"
        raise ServiceError(
            "invalid_request",
            f"{asked} needs the graph for interventions in the bundle {engine.bundle.manifest.name!r}: {reason}",
        )


def _check_counterfactual(attributor: Attributor, wanted: Counterfactual, texts: Texts, most: int) -> None:
    if wanted.label not in texts[0]:
        raise ServiceError("invalid_request", f"`counterfactual.label` {wanted.label!r} is not among the labels")
    if wanted.members > most:
        raise ServiceError(
            "invalid_request", f"`counterfactual.members` is {wanted.members:,}; at most {most:,} are allowed"
        )
    if wanted.of == "features" and not attributor.bundle.manifest.has_features:
        why = attributor.bundle.manifest.why_no_features
        raise ServiceError(
            "invalid_request", f"a `counterfactual` of features requires a CLT, unless `of` is patches: {why}"
        )
    if attributor.engine.sources is None:
        raise ServiceError(
            "invalid_request",
            f"`counterfactual` needs the source graphs of {attributor.model.name!r}: it was exported without them "
            "(`bundle.sources`), or VITRINE_SOURCES=false switches them off",
        )
    if wanted.of == "features":
        check_rerun("a `counterfactual` of features", attributor.engine)


def _resolved(
    attributor: Attributor, variants: Sequence[Sequence[Intervention]], request: InterveneRequest
) -> list[Changes]:
    """Of each variant. Raises `ServiceError` invalid_request that says where."""
    changes = []
    for place, edits in enumerate(variants):
        try:
            changes.append(resolve(edits, attributor.network, request.mode))
        except InterventionError as error:
            raise _refused(error, "edits" if request.variants is None else f"variants.{place}") from error
    return changes


def _refused(error: InterventionError, field: str) -> ServiceError:
    return ServiceError("invalid_request", f"{field}: {error}", [{"field": field, "problem": str(error)}])


async def _open(attributor: Attributor, wanted: Counterfactual) -> None:
    """Open the graphs that the search needs."""
    engine = attributor.engine
    assert engine.sources is not None  # see `_check_counterfactual`
    await attributor.open(engine.sources)
    if wanted.of == "features":
        assert engine.rerun is not None
        await attributor.open(engine.rerun.of("clt"))


async def _after(
    attributor: Attributor,
    parts: Decomposition,
    pixels: NDArray[np.float32],
    changes: Sequence[Changes],
    request: InterveneRequest,
) -> list[Decomposition]:
    """The image with each of the changes, one at a time: images of other requests go between."""
    found = []
    for place, one in enumerate(changes):
        try:
            if one.nothing:
                found.append(parts)
            elif request.mode == "direct":
                found.append(await attributor.in_thread(direct.changed, parts, one, attributor.bundle))
            else:
                rerun = attributor.engine.rerun
                assert rerun is not None  # see `check_rerun`
                await attributor.open(rerun.of(one.dictionary))
                found += await attributor.batcher.run_between(rerun.run, pixels[None], [one], spent=float(place))
        except InterventionError as error:
            raise _refused(error, "edits" if request.variants is None else f"variants.{place}") from error
    return found


def _variant(
    attributor: Attributor,
    before: Before,
    edits: list[Intervention],
    parts: Decomposition,
    request: AttributeRequest,
) -> Variant:
    after, difference = compared(attributor.bundle, before, parts, request)
    return Variant(edits=edits, after=after, difference=difference)
