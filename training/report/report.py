"""report.html: one file with all figures, readable without network or scripts, with a light and a dark theme."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import tomli_w
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from vitrine.models.bundle.model_card import first_labels
from vitrine.models.clip.loading import Clip
from vitrine.models.files.writing import write_text
from vitrine.training.data.held_out import HeldOut
from vitrine.training.evaluation.results import AnyResults, Results, SaeResults
from vitrine.training.report import figures
from vitrine.training.report.sheets import sheets
from vitrine.training.report.tables import Sheet, percent, points, signed

SECTIONS = {
    "reconstruction": "Reconstruction",
    "replacement": "Replacement",
    "contributions": "Contributions",
    "faithfulness": "Faithfulness",
    "nodes": "Insertion and deletion",
    "retrieval": "Retrieval",
    "provenance": "What was measured",
    "definitions": "Definitions",
}
DEFINITIONS = {
    "Cross-Layer Transcoder (CLT)": "Sparse stand-ins for all MLPs of a transformer at once. The code z_i of source "
    "layer i is made from what MLP i reads, and adds to the output of every MLP from i on: y_j = b_j + Σ z_i W(i→j).",
    "R²": "1 − Σ|y − y′|² / Σ|y − mean y|², over tokens and dimensions, for the MLP's output y and the CLT's y′; [CLS] "
    "and patches about their own means. A CLT's R² is the mean over layers.",
    "Outlier tokens, R² kept": "An outlier's MLP output is longer than three times the median of its layer's tokens. "
    "In pretrained ViTs a few are a hundred times as long: they own the variance, and R² with them says little about "
    "the others. R² kept: over the other tokens, about their own mean.",
    "Relative error": "Median over tokens of |y − y′|/|y|.",
    "L0, dead features": "Active features a token; share of features that fired for no token measured here.",
    "Cascaded replacement": "The MLPs of a window of layers are replaced by the CLT, and every later layer reads the "
    "replaced stream. Layers before the window read CLIP's own stream and still write into the window.",
    "Divergence": "Kullback-Leibler, of the zero-shot distribution over the labels from CLIP's own; mean over images.",
    "Contribution score C(i→j)": "Mean over tokens of ⟨c, y⟩/|y|² with c = z_i W(i→j) and y = Σ c over i ≤ j, without "
    "the bias. Centred: c and y less their means over the data set, by pair of layers and token type.",
    "Drop and keep": "The last MLP's output at [CLS] is the bias and what some source layers write, on CLIP's own "
    "stream. Dropped layers are left out; kept ones alone are left in.",
    "Insertion and deletion": "Each image's active features, over all tokens, are ranked and set to their means (over "
    "the val images, at [CLS] and at patches) in the running network: the difference they would have written is added, "
    "the true MLPs go on. Deletion: the best-ranked at their means. Insertion: all others. Images that CLIP classifies "
    "rightly, where that is known. Area: mean of the curve over the fractions as listed; low is good for deletion, "
    "high for insertion.",
    "Rankings of features": "For the top-1's logit less the mean over labels. Sources: z⟨W, G⟩, G the gradient at what "
    "each MLP wrote, back through attention alone with its weights and LayerNorms' denominators held fast; about the "
    "mean: (z − mean z)⟨W, G⟩ over all tokens. Direct: what a feature writes at [CLS], straight to the logit. "
    "Gradient × activation: the true gradient, through MLPs, attention and norms, in place of G. Activation: z summed "
    "over tokens.",
    "Retrieval": "Cosine of the sparse codes at [CLS] of one layer; the query itself is left out.",
    "Intervals": "Percentile bootstrap over images, 95 %. All figures share the resamples, so that differences are "
    "paired by image.",
    "The paper's figures": "arXiv 2604.13304, CLIP B/32 and B/16 on CIFAR-100, COCO and ImageNet-100: lowest to "
    "highest of its cells, for its own CLIPs and data. Accuracies under replacement and R² were read off its charts.",
}
SAE_SECTIONS = {
    name: SECTIONS[name] for name in ("reconstruction", "replacement", "nodes", "provenance", "definitions")
}
SAE_DEFINITIONS = {
    "Residual SAEs": "Sparse autoencoders of the residual stream, one after every block but the last. A token x is "
    "standardised by its own mean and deviation, x′ = (x − m)/s; z = φ(W x′ + b), and the SAE's version is "
    "(z V + c) s + m, with rows of V of length 1.",
    "Fraction of variance explained": "1 − Σ|x − x̂|² / Σ|x − mean x|², over tokens and dimensions; [CLS] and patches "
    "about their own means. Of standardised tokens, which is what the SAEs are trained on, and of the raw stream, in "
    "which a few massive tokens may own the variance. Without outliers: tokens not longer than three times the median "
    "of their layer's tokens, about their own mean.",
    "Relative error": "Median over tokens of |x′ − x̂′|/|x′|.",
    "Replacement": "The stream after a block is its SAE's version of it. In a window every later block, and SAE, reads "
    "what those before it made.",
    "Nodes": "A feature of a layer, over all tokens, or the error that its SAE leaves there: the paper's nodes. Token "
    "by token: each feature, and error, at one token. Neurons: a channel of the stream after a block, over all tokens. "
    "Active: features that fire in the image, and all errors and neurons.",
    "Insertion and deletion": "Each image's active nodes are ranked and set to their medians (by token, over train "
    "images) in the running network: later blocks, and SAEs, read the edited stream; errors stay unless their node is "
    "set. Deletion: the best-ranked at their medians. Insertion: all nodes but the best-ranked, silent ones too. "
    "Images that CLIP classifies rightly, where that is known. Area: mean of the curve over the fractions as listed, "
    "equally spaced; low is good for deletion, high for insertion. Regain: with the best-ranked 2 % inserted, the "
    "share of the way from all nodes at their medians to none.",
    "Rankings of nodes": "For the top-1's logit less the mean over labels. Relevance: (z − median) times the gradient "
    "at z, summed over tokens, with LayerNorms' denominators, attention's weights, the MLPs' gates and the logit's "
    "divisor held fast (LibraGrad), and errors being leaves, through which no gradient goes on. Through errors: it "
    "does. Nothing held fast: the plain gradient, errors being leaves. Gradient × activation: z times CLIP's own "
    "gradient. Activation: z, and of an error its length in units of the tokens' deviations. Neurons: the stream's "
    "channels less their medians, times LibraGrad's gradient.",
    **{name: DEFINITIONS[name] for name in ("L0, dead features", "Divergence", "Intervals")},
}
_TABLE_OF_SECTION = {
    "replacement": "cascades",
    "faithfulness": "faithfulness",
    "nodes": "nodes",
    "retrieval": "retrieval",
}
_THUMBNAIL = 96  # pixels


def write_report(results: Results | SaeResults, thumbnails: dict[int, str], path: Path) -> None:
    """Write the report; `thumbnails`: the images that retrieval shows, by their index in the data set, as data URIs."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=False
    )
    of_saes = isinstance(results, SaeResults)
    titles = SAE_SECTIONS if of_saes else SECTIONS
    tables = sheets(results) | {"provenance": _provenance(results)}
    missing = {name for name, table in _TABLE_OF_SECTION.items() if table not in tables}
    drawn = _drawn_of_saes(results) if isinstance(results, SaeResults) else _drawn_of_clt(results)
    page = environment.get_template("residual_sae.html.j2" if of_saes else "report.html.j2").render(
        results=results,
        sections=[(name, title) for name, title in titles.items() if name not in missing],
        key_figures=_key_figures(results),
        figures={name: Markup(getattr(figures, name)(results)) for name in drawn},  # noqa: S704  (our own SVG)
        tables=tables,
        examples=_examples(results, thumbnails) if isinstance(results, Results) else [],
        recipe=tomli_w.dumps(results.recipe.model_dump(mode="json", exclude_none=True)),
        definitions=(SAE_DEFINITIONS if of_saes else DEFINITIONS).items(),
    )
    write_text(path, page)


def _drawn_of_clt(results: Results) -> list[str]:
    drawn = ["reconstruction", "outliers", "sparsity", "contributions"]
    drawn += ["cascades"] if results.baseline else []
    drawn += ["faithfulness"] if results.faithfulness else []
    drawn += ["nodes"] if results.nodes else []
    return drawn + (["retrieval"] if results.retrieval else [])


def _drawn_of_saes(results: SaeResults) -> list[str]:
    drawn = ["reconstruction", "sparsity"] + (["singles"] if results.singles else [])
    drawn += ["cascades"] if results.baseline else []
    return drawn + (["nodes"] if results.nodes else [])


def draw_thumbnails(results: Results, images: HeldOut, clip: Clip) -> dict[int, str]:
    """Data URIs of all images that the report shows, cropped and resized as for CLIP."""
    examples = results.retrieval.examples if results.retrieval else []
    indices = sorted({image for e in examples for layer in e.layers for image in layer} | {e.query for e in examples})
    mean, std = (torch.tensor(clip.preprocess[key])[:, None, None] for key in ("mean", "std"))
    return {at: _data_uri(pixels * std + mean) for at, pixels in zip(indices, images.pixels(indices), strict=True)}


def _data_uri(colours: torch.Tensor) -> str:
    """An image [3, H, W] with values in [0, 1] as a JPEG in a data URI."""
    array = (colours.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    image, buffer = Image.fromarray(array), io.BytesIO()
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    image.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _key_figures(results: Results | SaeResults) -> list[tuple[str, str, str]]:
    """(name, figure, note) for the top of the page."""
    everywhere, at_cls = results.reconstruction["all"], results.reconstruction["cls"]
    whole = "every MLP replaced" if isinstance(results, Results) else "every SAE in place"
    figures = [
        ("R², all tokens", f"{everywhere.r2.value:.3f}", "mean over layers"),
        ("R², no outliers", "–" if everywhere.r2_kept is None else f"{everywhere.r2_kept:.3f}", "mean over layers"),
        ("R², [CLS]", f"{at_cls.r2.value:.3f}", "mean over layers"),
    ]
    full_cascade = results.cascade(0, results.layers - 1, "all") if results.cascades else None
    if full_cascade and not results.baseline:
        figures.append((whole, f"{full_cascade.agreement.value:.1%}", "same prediction as CLIP"))
    if results.baseline:
        figures.append(("CLIP's top-1", f"{results.baseline.value:.1%}", percent(results.baseline).split(" ", 1)[1]))
    if full_cascade and full_cascade.top1:
        change = f"{points(full_cascade.difference)} points"
        figures.append((whole, f"{full_cascade.top1.value:.1%}", change))
    measured = results.faithfulness if isinstance(results, Results) else None
    curve = measured.curve("cls") if measured else None
    if curve and curve.keep_top4 and curve.drop_top1:
        figures.append(("keep the first four", signed(curve.keep_top4.value), "points, last layer"))
        figures.append(("drop the first", signed(curve.drop_top1.value), "points, last layer"))
    return figures


def _provenance(results: AnyResults) -> Sheet:
    seeds = results.seeds
    rows = [
        ["CLIP", f"{results.clip.name} ({results.clip.weights})"],
        ["CLIP's sha256", results.clip.sha256],
        ["checkpoint", f"{results.recipe.name}, step {results.step:,}"],
        ["checkpoint's sha256", results.checkpoint_sha256],
        ["images", f"{results.images:,} of {results.recipe.data.name}, val"],
        ["labels", first_labels(results.labels)],
        ["seeds", f"sample {seeds.sample}, bootstrap {seeds.bootstrap}, random orders {seeds.orders}"],
        ["bootstrap", f"{results.resamples:,} resamples"],
    ]
    comparison = results.comparison if isinstance(results, Results) else None
    if comparison:
        kind = "cross-layer" if comparison.cross_layer else "per-layer"
        rows.append([f"compared with {comparison.name} ({kind})", comparison.checkpoint_sha256])
    rows += [["left out", reason] for reason in results.left_out]
    return Sheet("What these figures belong to.", ["what", "which"], rows, text=2)


def _examples(results: Results, thumbnails: dict[int, str]) -> list[dict[str, Any]]:
    """Queries and their neighbours at four layers, including the first and the last."""
    last = results.layers - 1
    shown = sorted({round(last * third / 3) for third in range(4)})
    return [
        {
            "label": example.label,
            "image": thumbnails[example.query],
            "layers": [
                {
                    "number": layer,
                    "images": [
                        {"image": thumbnails[at], "label": label, "same": label == example.label}
                        for at, label in zip(example.layers[layer], example.labels[layer], strict=True)
                    ],
                }
                for layer in shown
            ],
        }
        for example in (results.retrieval.examples if results.retrieval else [])
    ]
