"""report.html: one file with all figures, readable without network or scripts, with a light and a dark theme."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli_w
import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from vitrine.models.bundle.model_card import first_labels
from vitrine.models.clip.loading import Clip
from vitrine.models.files.writing import prepare_folder, write_text
from vitrine.training.data.held_out import HeldOut
from vitrine.training.evaluation.results import AnyResults, Results
from vitrine.training.evaluation.sae_results import SaeResults
from vitrine.training.report import figures, sae_figures
from vitrine.training.report.definitions import DEFINITIONS, SAE_DEFINITIONS, SAE_SECTIONS, SECTIONS
from vitrine.training.report.drawing import standalone
from vitrine.training.report.sheets import sheets
from vitrine.training.report.tables import Sheet, percent, points, signed

_TABLE_OF_SECTION = {
    "replacement": "cascades",
    "faithfulness": "faithfulness",
    "nodes": "nodes",
    "retrieval": "retrieval",
    "beside": "beside",
}
FIGURES = "figures"  # folder beside the report
_THUMBNAIL = 96  # pixels


def write_report(results: Results | SaeResults, thumbnails: dict[int, str], path: Path) -> None:
    """Write the report, and its figures beside it as files.

    thumbnails: the images that retrieval shows, by their index in the data set, as data URIs.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=False
    )
    of_saes = isinstance(results, SaeResults)
    titles = SAE_SECTIONS if of_saes else SECTIONS
    tables = sheets(results) | {"provenance": _provenance(results)}
    drawings = _drawn_of_saes(results) if isinstance(results, SaeResults) else _drawn_of_clt(results)
    drawn = {name: draw(results) for name, draw in drawings.items()}
    missing = {name for name, table in _TABLE_OF_SECTION.items() if table not in tables}
    page = environment.get_template("residual_sae.html.j2" if of_saes else "report.html.j2").render(
        results=results,
        sections=[(name, title) for name, title in titles.items() if name not in missing],
        key_figures=_key_figures(results),
        figures={name: Markup(drawing) for name, drawing in drawn.items()},  # noqa: S704  (our own SVG)
        tables=tables,
        examples=_examples(results, thumbnails) if isinstance(results, Results) else [],
        recipe=tomli_w.dumps(results.recipe.model_dump(mode="json", exclude_none=True)),
        definitions=(SAE_DEFINITIONS if of_saes else DEFINITIONS).items(),
    )
    write_text(path, page)
    prepare_folder(path.parent / FIGURES)
    for name, drawing in drawn.items():
        write_text(path.parent / FIGURES / f"{name}.svg", standalone(drawing))


def _drawn_of_clt(results: Results) -> dict[str, Callable[[Any], str]]:
    drawn = ["reconstruction", "outliers", "sparsity", "contributions"]
    drawn += ["cascades"] if results.baseline else []
    drawn += ["faithfulness"] if results.faithfulness else []
    drawn += ["nodes"] if results.nodes else []
    drawn += ["retrieval"] if results.retrieval else []
    return {name: getattr(figures, name) for name in drawn}


def _drawn_of_saes(results: SaeResults) -> dict[str, Callable[[Any], str]]:
    drawn = ["reconstruction", "sparsity"]
    drawn += ["cascades"] if results.baseline else []
    drawn += ["nodes"] if results.nodes else []
    own = ["levels", *(["singles"] if results.singles else [])]
    own += ["beside"] if results.beside and results.beside.nodes else []
    return {name: getattr(figures, name) for name in drawn} | {name: getattr(sae_figures, name) for name in own}


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
    if isinstance(results, SaeResults) and results.beside:
        rows.append([f"compared with {results.beside.clt.name} (CLT)", results.beside.clt.checkpoint_sha256])
    rows += [["not measured", reason] for reason in results.left_out]
    return Sheet("What was measured, and on what.", ["item", "value"], rows, text=2)


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
