"""MODEL_CARD.md, for human readers: what a bundle is, its training data, its quality and its limits."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vitrine.models.bundle.layout import Variant
    from vitrine.models.bundle.manifest import Agreement, CardsSummary, Manifest, Metrics, ResidualSummary, Shape


LABELS_NAMED = 50  # of many


def model_card(manifest: Manifest) -> str:
    """The text of the card, generated from the manifest."""
    clip = manifest.clip
    of_saes = _residual(manifest.residual) + _cards("Cards of residual SAEs' features", manifest.residual_cards)
    return f"""# {manifest.name}

{manifest.description}

- **CLIP**: {clip.name}, weights {clip.weights} (sha256 {clip.sha256})
{_clt(manifest)}- **Precisions**: fp32{"".join(map(_agreement, manifest.agreement.items()))}
{_trained(manifest)}- **Default labels**: {first_labels(manifest.text.labels)}
- **Licence of this bundle**: {manifest.licence}
{_measured(manifest)}{_cards("Feature cards", manifest.cards)}{of_saes}{_recipe(manifest)}"""


def _clt(manifest: Manifest) -> str:
    shape = manifest.shape
    if not manifest.has_features:
        return f"""- **CLT**: none, so accounts have the MLPs' rows but no features; {shape.layers} layers,
  width {shape.width}, embedding {shape.embedding}
"""
    return f"""- **CLT**: {shape.layers} layers x {shape.features:,} features, {_decoder_targets(shape)};
  width {shape.width}, embedding {shape.embedding}, tables in {manifest.tables}
- **Sparsifier**: {manifest.sparsifier}; active features per token and layer{_budget_note(manifest)}:
  {_budget(shape.k_cls, shape.k)} on [CLS], {_budget(shape.k_patches, shape.k)} on patches
"""


def _trained(manifest: Manifest) -> str:
    data = manifest.data
    if data is None:
        return ""
    return f"""- **Trained on**: {data.name}, {data.train_images:,} images; licence of the data: {data.licence}
- **Measured on**: {data.name}, {data.val_images:,} held-out images
"""


def _measured(manifest: Manifest) -> str:
    """Figures of the CLT, and what they say."""
    if not manifest.has_features:
        return """
A ledger accounts for what *this CLIP* computed. It does not say that the prediction is right.
"""
    figures = manifest.metrics.model_dump(exclude={"layers"}, exclude_none=True)
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in figures.items())
    return f"""
| metric (val) | value |
|---|---|
{rows}

r2, cosine: CLT against true MLP outputs, all tokens, mean over layers; r2_cls: only [CLS]. dead_share: features
that never fired on val. zero_shot_top1: of the unmodified CLIP, with the default templates.
{_by_layer(manifest.metrics)}
A ledger accounts for what *this CLIP* computed. It does not say that the prediction is right, and its features
represent the MLPs only as well as `fidelity` in every answer says.
"""


def _recipe(manifest: Manifest) -> str:
    if not manifest.has_features:
        return ""
    return f"""
## Recipe

```toml
{manifest.recipe.strip()}
```
"""


def first_labels(labels: Sequence[str]) -> str:
    """The labels, of many the first ones and how many there are besides."""
    if len(labels) <= LABELS_NAMED:
        return ", ".join(labels) or "none"
    return f"{', '.join(labels[:LABELS_NAMED])} and {len(labels) - LABELS_NAMED:,} more"


def _by_layer(metrics: Metrics) -> str:
    """What the newer figures mean, and a table of them by layer; nothing in a bundle without them."""
    if not metrics.layers:
        return ""
    columns, names = [], []
    for kind, title in (("all", "all tokens"), ("cls", "[CLS]"), ("patches", "patches")):
        of_kind = metrics.layers[kind]  # type: ignore[index]
        columns += [of_kind.r2, of_kind.r2_kept, of_kind.relative_error]
        names += [f"R², {title}", f"R² kept, {title}", f"relative error, {title}"]
    columns += [metrics.layers["all"].outliers, metrics.layers["all"].cosine]
    names += ["outliers", "cosine"]
    rows = [
        f"| {layer} | {' | '.join('–' if value is None else f'{value:.4f}' for value in row)} |"
        for layer, row in enumerate(zip(*columns, strict=True))
    ]
    head = f"| layer | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}"
    return f"""
outliers: share of tokens whose MLP output is longer than three times the median of its layer; kept: the others. A few
such tokens have most of the variance, so R² says little about the others. relative_error: median over tokens of
|y - y'| / |y|. worst: of the layer where it is lowest. agreement: share of images that keep CLIP's own top-1.

{head}
{chr(10).join(rows)}
"""


def _cards(title: str, cards: CardsSummary | None) -> str:
    if cards is None:
        return ""
    quality = cards.quality
    label_check = "none of them could be checked on held-out images"
    if quality.auroc_share is not None:
        label_check = (
            f"of the {quality.measured:,} that could be checked on {quality.held_out_images:,} held-out "
            f"images, {quality.auroc_share:.1%} predict when their feature fires (AUROC of 0.8 or better; "
            f"{quality.auroc_share_shuffled:.1%} with the same labels shuffled)"
        )
    return f"""
## {title}

From {cards.images:,} images of {cards.data} and {cards.vocabulary:,} words; pictures: {cards.pictures}.
{quality.labelled:,} features have a label: {label_check}.
The others have no label, because none was good enough.
"""


def _residual(residual: ResidualSummary | None) -> str:
    if residual is None:
        return ""
    data, figures = residual.data, residual.metrics
    measured = {
        "variance explained, mean of layers": figures.r2,
        "variance explained, the worst layer": figures.r2_worst,
        "variance explained at [CLS], mean of layers": figures.r2_cls,
        "features that never fired": figures.dead_share,
        "top-1 with every SAE replacing the stream": figures.replacement_all_top1,
    }
    rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in measured.items() if value is not None)
    table = f"\n| metric (val) | value |\n|---|---|\n{rows}\n" if rows else ""
    return f"""
## Residual SAEs

One after every block but the last ([arXiv 2509.17401](https://arxiv.org/abs/2509.17401)), for circuits by features of
the stream; {residual.bytes / 1e6:.1f} MB of this bundle, tables in {residual.tables}.

- **Features**: {_budget(residual.features, 0)}
- **Sparsifier**: {residual.sparsifier}; active features per token: {_budget(residual.k_cls, 0)} on [CLS],
  {_budget(residual.k, 0)} on patches
- **Trained on**: {data.name}, {data.train_images:,} images; licence of the data: {data.licence}
- **Measured on**: {data.name}, {data.val_images:,} held-out images, each token standardised by itself
{table}
```toml
{residual.recipe.strip()}
```
"""


def _agreement(variant: tuple[Variant, Agreement]) -> str:
    name, result = variant
    features = "" if result.top_features is None else f" and {result.top_features:.1%} of the ten top features"
    return (
        f"; {name}, which on {result.images:,} held-out images agrees with fp32 in {result.top1:.1%} of the "
        f"top-1{features} (cosine of the ledgers {result.ledger_cosine:.4f})"
    )


def _decoder_targets(shape: Shape) -> str:
    if shape.cross_layer:
        return "cross-layer: each writes to the MLP outputs of its own layer and of all later ones"
    return "per-layer: each writes to the MLP output of its own layer only"


def _budget_note(manifest: Manifest) -> str:
    """Whether the budgets hold per token or on average; if on average, the upper bound per token."""
    if manifest.sparsifier in ("relu_topk", "abs_topk"):
        return ""
    return f" on average (at most {manifest.shape.k} when served)"


def _budget(budgets: tuple[int, ...] | None, k: int) -> str:
    """One number if it is the same in every layer, else one per layer."""
    distinct = dict.fromkeys(budgets or (k,))
    return str(*distinct) if len(distinct) == 1 else f"{', '.join(map(str, budgets or ()))} (by layer)"
