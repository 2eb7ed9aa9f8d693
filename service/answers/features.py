"""From the bundle's cards to answers: one feature's card, a search by label."""

from __future__ import annotations

import base64
from typing import Any
from urllib.parse import urlencode

import numpy as np

from vitrine.models.bundle.bundle import Bundle
from vitrine.models.bundle.cards import BINS, QUANTILES, Card, CardImage, Cards
from vitrine.models.bundle.layout import CARDS, Dictionary
from vitrine.models.bundle.manifest import patch_grid
from vitrine.service.errors import ServiceError
from vitrine.service.schemas.base import Model
from vitrine.service.schemas.features import (
    CardResponse,
    CoactiveFeature,
    Exemplar,
    FeatureLine,
    FeaturesQuery,
    FeaturesResponse,
    Frequency,
    Histogram,
    Written,
)


def card_dictionaries(bundle: Bundle) -> list[Dictionary]:
    """Of whose features there are cards."""
    return [dictionary for dictionary in CARDS if bundle.manifest.cards_of(dictionary)]


def require_cards(bundle: Bundle, dictionary: Dictionary = "clt") -> Cards:
    """The bundle's cards of a dictionary's features. Raises `ServiceError` no_cards."""
    cards, name = bundle.cards_of(dictionary), bundle.manifest.name
    if cards is None:
        missing = "feature cards; `vitrine cards` makes them"
        if dictionary == "clt" and not bundle.manifest.has_features:
            raise ServiceError("no_cards", f"there are no feature cards: {bundle.manifest.why_no_features}")
        if dictionary == "residual":
            missing = "residual SAEs"
            if bundle.has_residual:
                missing = "cards of its residual SAEs' features; `vitrine cards` makes them from the SAEs' checkpoint"
        raise ServiceError("no_cards", f"the bundle {name!r} has no {missing}")
    return cards


def card(bundle: Bundle, model: Model, dictionary: Dictionary, layer: int, index: int) -> CardResponse:
    """One feature's card. Raises `ServiceError` no_cards, or not_found for a feature that does not exist."""
    cards, features = require_cards(bundle, dictionary), bundle.manifest.features_of(dictionary)
    if not 0 <= layer < len(features):
        raise ServiceError("not_found", f"there is no layer {layer}; the layers are 0 to {len(features) - 1}")
    if not 0 <= index < features[layer]:
        raise ServiceError(
            "not_found", f"layer {layer} has no feature {index}; its features are 0 to {features[layer] - 1}"
        )
    record = cards.card(layer, index)
    images = cards.images([exemplar.image for exemplar in record.exemplars])
    rows, columns = patch_grid(bundle.manifest.preprocessing, bundle.manifest.shape.tokens - 1)
    return CardResponse(
        model=model,
        dictionary=dictionary,
        layer=layer,
        index=index,
        label=record.label,
        abstained=record.abstained,
        label_score=record.label_score,
        label_margin=record.label_margin,
        label_clarity=record.label_clarity,
        label_auroc=record.label_auroc,
        writes=_written_label(record),
        read_at=record.read_at,
        frequency=Frequency(cls=record.frequency_cls, patches=record.frequency_patches),
        quantiles={f"{at:g}": value for at, value in zip(QUANTILES, record.quantiles, strict=False)},
        histogram=_histogram(record),
        exemplars=[
            Exemplar(
                **reference(image),
                activation=exemplar.activation,
                mask=(np.frombuffer(exemplar.mask, np.uint8) * (record.mask_scale / 255)).round(4).tolist(),
            )
            for exemplar, image in zip(record.exemplars, images, strict=True)
        ],
        mean_picture=_data_url(record.mean_picture),
        rows=rows,
        columns=columns,
        coactive=[
            CoactiveFeature(
                layer=other.layer,
                index=other.index,
                label=cards.label(other.layer, other.index)[0],
                jaccard=other.jaccard,
            )
            for other in record.coactive
        ],
    )


def search(bundle: Bundle, model: Model, query: FeaturesQuery) -> FeaturesResponse:
    """A page of labelled features. Raises `ServiceError` no_cards."""
    cards = require_cards(bundle, query.dictionary)
    total, lines = cards.search(query.label, query.layer, query.offset, query.limit)
    next_offset = query.offset + len(lines)
    next_query = query.model_copy(update={"offset": next_offset}).model_dump(exclude_none=True)
    return FeaturesResponse(
        model=model,
        dictionary=query.dictionary,
        total=total,
        offset=query.offset,
        limit=query.limit,
        next=f"/v1/features?{urlencode(next_query)}" if lines and next_offset < total else None,
        features=[FeatureLine(**vars(line)) for line in lines],
    )


def _written_label(card: Card) -> Written | None:
    if card.writes is None or card.writes_score is None or card.writes_margin is None:
        return None
    return Written(label=card.writes, score=card.writes_score, margin=card.writes_margin)


def _histogram(card: Card) -> Histogram | None:
    if not card.histogram:
        return None
    return Histogram(edges=np.linspace(0, card.largest, BINS + 1).tolist(), counts=card.histogram)


def reference(image: CardImage) -> dict[str, Any]:
    """The fields of a `ReferenceImage`."""
    return {"name": image.name, "class_name": image.class_name, "thumbnail": _data_url(image.picture)}


def _data_url(picture: bytes | None) -> str | None:
    """A data: URL, which the pages' content security policy allows: it needs no further request."""
    return None if picture is None else "data:image/webp;base64," + base64.b64encode(picture).decode()
