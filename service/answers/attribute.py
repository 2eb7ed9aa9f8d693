"""Predictions and their account, for one image or a batch."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from vitrine.models.account.ledger import Decomposition
from vitrine.models.account.sources import Trace
from vitrine.models.bundle.bundle import Bundle
from vitrine.service.answers.answer_size import attribution_values, check_answer_size
from vitrine.service.answers.attention import attention_account
from vitrine.service.answers.attributor import Attributor, Inferred
from vitrine.service.answers.explain import account, check_edited, check_explain, lens, matrix, predict
from vitrine.service.answers.many import all_of
from vitrine.service.answers.notices import to_notices, unlike_labels
from vitrine.service.answers.residual import residual_features
from vitrine.service.answers.scoring import scoring_of, verdict
from vitrine.service.answers.serialise import json_text
from vitrine.service.answers.sources import directions, source_accounts
from vitrine.service.answers.texts import Texts
from vitrine.service.engine.edits import ServedEdit
from vitrine.service.engine.labels import LabelSet
from vitrine.service.errors import ServiceError
from vitrine.service.operations import metrics
from vitrine.service.operations.stages import timed_stage
from vitrine.service.schemas.attribute import (
    AttributeRequest,
    AttributeResponse,
    Attribution,
    Explain,
    Explanation,
    Fidelity,
    LensLayer,
)
from vitrine.service.schemas.base import ItemError, Notice
from vitrine.service.schemas.batch import BatchItem, BatchResponse
from vitrine.service.schemas.classify import Prediction, Verdict
from vitrine.service.schemas.edits import EditUsed
from vitrine.service.schemas.residual import ResidualFeatures


class _Item(NamedTuple):
    """One image's part of a batch."""

    text: bytes
    predictions: list[Prediction]
    edit: EditUsed | None


class BatchAnswer(NamedTuple):
    """The JSON of a `BatchResponse`, in pieces, and the predictions of the images that were answered."""

    pieces: list[bytes]
    predictions: list[list[Prediction]]


async def answer_attribute(
    attributor: Attributor, image: bytes, request: AttributeRequest, request_id: str
) -> AttributeResponse:
    """Predictions and their account. Raises `ServiceError`."""
    texts, edit = _check_request(attributor, request)
    with attributor.admit():
        await attributor.check_labels(texts, request.strict)
        attribution, inferred = await attribute_image(attributor, image, request, *texts, edit)
    fields = dict(attribution) | {"warnings": all_warnings(inferred, attribution)}
    return AttributeResponse(request_id=request_id, model=attributor.model, **fields)


async def answer_batch(
    attributor: Attributor, images: Sequence[bytes | ServiceError], request: AttributeRequest, request_id: str
) -> BatchAnswer:
    """The same for each of at most `settings.images_per_request` images; one that fails has its error instead.

    Raises `ServiceError` for errors of the whole request. The images are admitted together or not at all. Each answer
    becomes JSON as soon as it is complete: as objects, the answers of a batch would take ten times the memory.
    """
    texts, edit = _check_request(attributor, request, len(images))

    async def answer_one(image: bytes | ServiceError) -> _Item:
        try:
            if isinstance(image, ServiceError):
                raise image
            answer, _ = await attribute_image(attributor, image, request, *texts, edit)
            item = BatchItem(status=200, answer=answer, error=None)
        except ServiceError as error:
            metrics.REJECTED.labels(error.code).inc()
            problem = ItemError(code=error.code, message=error.message, details=error.details)
            item = BatchItem(status=error.status, answer=None, error=problem)
        # Not after the other images: until then these are tens of thousands of objects for the garbage collector.
        text = await attributor.in_thread(json_text, item, in_turn=False)
        return _Item(text, *((made.predictions, made.edit) if (made := item.answer) else ([], None)))

    with attributor.admit(len(images)), attributor.taking_turns():
        await attributor.check_labels(texts, request.strict)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(answer_one(image)) for image in images]
        notices = to_notices(await attributor.labels.notices(*texts))
    results = [task.result() for task in tasks]
    applied = any(item.edit.applied for item in results if item.edit)
    used = edit.used(applied) if edit else None
    response = BatchResponse(request_id=request_id, model=attributor.model, edit=used, warnings=notices, results=[])
    head = response.model_dump_json()
    pieces = [head.removesuffix("]}").encode()]
    for item in results:
        pieces += (item.text, b",")
    pieces[-1] = b"]}"
    return BatchAnswer(pieces, [item.predictions for item in results if item.predictions])


async def attribute_each(
    attributor: Attributor, images: Sequence[bytes], request: AttributeRequest, names: Sequence[str]
) -> list[tuple[bytes, list[Prediction]]]:
    """(JSON of the `Attribution`, predictions) of each image. names: of the images, for errors.

    Raises `ServiceError`, also if one of the images cannot be answered.
    """
    texts, edit = _check_request(attributor, request, len(images))

    async def one(image: bytes) -> tuple[bytes, list[Prediction]]:
        answer, inferred = await attribute_image(attributor, image, request, *texts, edit)
        answer = answer.model_copy(update={"warnings": all_warnings(inferred, answer)})
        return await attributor.in_thread(json_text, answer, in_turn=False), answer.predictions

    with attributor.admit(len(images)), attributor.taking_turns():
        await attributor.check_labels(texts, request.strict)
        return await all_of(images, one, names)


def _check_request(
    attributor: Attributor, request: AttributeRequest, images: int = 1
) -> tuple[Texts, ServedEdit | None]:
    texts, settings = attributor.texts(request), attributor.settings
    if (edit := attributor.edits.chosen(request.edit)) is not None:
        check_edited(request.explain)
    check_explain(request.explain, texts[0], settings.max_targets, attributor.engine)
    if request.scoring != "softmax" and request.explain.lens:
        raise ServiceError("invalid_request", "`explain.lens` shows softmax probabilities; set `scoring` to softmax")
    scoring_of(request, texts[0], attributor.bundle.manifest.logit_scale)  # refuses before anything is computed
    values = images * attribution_values(attributor.bundle.manifest, request, len(texts[0]))
    check_answer_size(values, settings.max_answer_values, "send fewer images, or request fewer targets or details")
    return texts, edit


async def attribute_image(
    attributor: Attributor,
    image: bytes,
    request: AttributeRequest,
    labels: tuple[str, ...],
    templates: tuple[str, ...],
    edit: ServedEdit | None = None,
    details: bool = False,
    components: bool = False,
) -> tuple[Attribution, Inferred]:
    """(the answer, with the image's own warnings; what it was made of, with details and components on request)."""
    timings, explain = dict[str, float](), request.explain
    details = details or explain.heatmap or explain.lens
    inferred = await attributor.infer(image, labels, templates, timings, details, explain.matrix, components, edit)
    with timed_stage("ledger", timings):
        predictions, judged, explanations, lens_layers, fidelity = await attributor.in_thread(
            account_of, attributor.bundle, inferred.parts, inferred.labels, request
        )
    trace = attention = None
    if explain.sources:
        explanations, trace = await _with_sources(attributor, inferred, explain, explanations, timings)
    if explain.attention is not None:
        with timed_stage("attention", timings):
            attention = await attention_account(attributor, inferred.pixels, trace, explain.attention)
    residual = await _residual(attributor, inferred, explain, timings) if explain.residual else None
    _observe(explanations, fidelity)
    notes = (*inferred.notes, *unlike_labels(attributor.bundle.manifest.text.fit, predictions, judged))
    attribution = Attribution(
        edit=inferred.edit,
        warnings=to_notices(image=notes),
        predictions=predictions,
        verdict=judged,
        explanations=explanations,
        lens=lens_layers,
        matrix=None if inferred.contributions is None else matrix(inferred.contributions),
        attention=attention,
        residual=residual,
        fidelity=fidelity,
        timings_ms=timings,
    )
    return attribution, inferred


def all_warnings(inferred: Inferred, attribution: Attribution) -> list[Notice]:
    """The labels' warnings before the image's own."""
    return to_notices(inferred.labels.notices) + attribution.warnings


async def _with_sources(
    attributor: Attributor,
    inferred: Inferred,
    explain: Explain,
    explanations: list[Explanation],
    timings: dict[str, float],
) -> tuple[list[Explanation], Trace]:
    """The explanations with their source accounts, and the image's trace."""
    engine, labels = attributor.engine, inferred.labels
    assert engine.sources is not None  # see `check_explain`
    with timed_stage("sources", timings):
        top1 = labels.labels.index(explanations[0].target)
        of = directions(labels, explain, top1)
        await attributor.open(engine.sources)
        trace, outputs = await attributor.batcher.run_between(engine.sources.run, inferred.pixels, of, spent=0.0)
        accounts = await attributor.in_thread(source_accounts, attributor.bundle, trace, outputs, of, explain)
    explained = [
        explanation.model_copy(update={"sources": sources})
        for explanation, sources in zip(explanations, accounts, strict=True)
    ]
    return explained, trace


async def _residual(
    attributor: Attributor, inferred: Inferred, explain: Explain, timings: dict[str, float]
) -> ResidualFeatures:
    """What the residual SAEs read in the image."""
    graphs = attributor.engine.residual
    assert graphs is not None  # see `check_explain`
    with timed_stage("residual", timings):
        await attributor.open(graphs)
        trace = await attributor.batcher.run_between(graphs.trace, inferred.pixels, spent=0.0)
        return await attributor.in_thread(residual_features, attributor.bundle, trace, explain.features)


def account_of(
    bundle: Bundle, parts: Decomposition, labels: LabelSet, request: AttributeRequest
) -> tuple[list[Prediction], Verdict | None, list[Explanation], list[LensLayer] | None, Fidelity | None]:
    """What the answer says of one decomposition: predictions, verdict, an explanation per target, lens, fidelity."""
    scale = bundle.manifest.logit_scale
    scoring = scoring_of(request, labels.labels, scale)
    predictions, judged = predict(parts, labels, scale, request.top_k, scoring), verdict(parts, labels, scale, scoring)
    explanations, fidelity = account(parts, labels, bundle, request.explain, scoring)
    return predictions, judged, explanations, lens(parts, labels, scale) if request.explain.lens else None, fidelity


def _observe(explanations: list[Explanation], fidelity: Fidelity | None) -> None:
    """Record in the metrics what the account says about the bundle; without a CLT, the layers' shares alone."""
    if fidelity is not None:
        metrics.FIDELITY_R2.observe(fidelity.r2)
        metrics.ERROR_SHARE.observe(fidelity.error_share)
        metrics.AGREES.labels(str(fidelity.reconstructed_top1_agrees).lower()).inc()
    if fidelity is not None and (sources := explanations[0].sources) is not None:
        metrics.SOURCE_ERROR_SHARE.observe(sources.error_share)
    for layer in explanations[0].layers:  # first target only: one series per layer is enough
        metrics.LAYER_SHARE.labels(layer.layer).observe(layer.share)
