"""What the tables of cards must hold, as SQL: a wrong value is refused with the bundle, before anybody asks for it."""

from __future__ import annotations

from collections.abc import Sequence

_REQUIRED = ("frequency_cls", "frequency_patches", "largest", "mask_scale")
_OPTIONAL = ("label_score", "label_margin", "label_clarity", "label_auroc", "writes_score", "writes_margin")


def feature_checks(features: str, images: str, counts: Sequence[int], bins: int, quantiles: int) -> dict[str, str]:
    """Problem -> query that counts the rows which have it. features, images: the tables, as SQL; counts: of features by
    layer; bins, quantiles: numbers of a card's histogram and quantiles. A column that is missing, or of another type,
    is an error of the query itself."""
    numbers = [f"NOT coalesce(isfinite({name}), false)" for name in _REQUIRED]
    numbers += [f"NOT isfinite({name})" for name in _OPTIONAL]
    numbers.append("len(list_filter(quantiles, lambda q: NOT coalesce(isfinite(q), false))) > 0")
    # lists count from 1, and from the end with negative numbers; beyond them there is NULL
    place = f"layer < 0 OR index NOT BETWEEN 0 AND {list(counts)}[layer + 1] - 1"
    rows = f"SELECT count(*) FROM {features} WHERE "  # noqa: S608
    return {
        "features that do not exist": f"{rows} coalesce({place}, true)",
        "features that are listed twice": f"SELECT count(*) - count(DISTINCT (layer, index)) FROM {features}",  # noqa: S608
        "numbers that are missing or not finite": rows + " OR ".join(numbers),
        "invalid values": f"""{rows}
            coalesce(read_at NOT IN ('cls', 'patches'), true) OR len(quantiles) NOT IN (0, {quantiles})
            OR len(histogram) NOT IN (0, {bins})
            OR abstained NOT IN ('too_few_exemplars', 'score', 'clarity', 'margin')
            OR octet_length(mean_picture) = 0 OR concat(label, writes) IS NULL""",
        "exemplars that are not finite, or have no image": f"""
            SELECT count(*) FROM (SELECT unnest(exemplars) AS one FROM {features})
            WHERE NOT coalesce(isfinite(one.activation), false) OR octet_length(one.mask) IS NULL
            OR coalesce(one.image NOT IN (SELECT image FROM {images}), true)""",  # noqa: S608
        "coactive features that do not exist, or are not finite": f"""
            SELECT count(*) FROM (SELECT unnest(coactive, recursive := true) FROM {features})
            WHERE NOT coalesce(isfinite(jaccard), false) OR coalesce({place}, true)""",  # noqa: S608
    }


def image_checks(images: str, references: int) -> dict[str, str]:
    """The same for the table of images, of which the first `references` are compared with."""
    return {
        "images that are listed twice": f"SELECT count(*) - count(DISTINCT image) FROM {images}",  # noqa: S608
        "rows without a number, name or class": f"""
            SELECT count(*) FROM {images}
            WHERE image IS NULL OR name IS NULL OR class_name IS NULL OR octet_length(picture) = 0""",  # noqa: S608
        "too few reference images, missing": f"""
            SELECT {references} - count(*) FROM {images} WHERE image BETWEEN 0 AND {references - 1}""",  # noqa: S608
    }
