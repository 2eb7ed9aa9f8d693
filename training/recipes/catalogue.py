"""The recipes shipped with Vitrine: looked up by name, listed with their costs."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from vitrine.models.tables import show
from vitrine.training.recipes.clip_shape import UnknownShape
from vitrine.training.recipes.costs import GIB, GPUS, Costs, Matmul, Work, cache_bytes, estimate, features
from vitrine.training.recipes.reading import load_recipe
from vitrine.training.recipes.recipe import CltRecipe, RecipeError, ResidualSaeRecipe

Recipe = CltRecipe | ResidualSaeRecipe

SHIPPED = Path(__file__).parent
MATMULS: tuple[Matmul, ...] = ("fp32", "tf32", "bf16")
UNKNOWN = "?"


def shipped() -> list[Path]:
    """Paths of the recipes shipped with Vitrine, sorted by name."""
    return sorted(SHIPPED.glob("*.toml"))


def find_recipe(name_or_path: str | Path) -> Path:
    """A shipped recipe by name, or any recipe by path. Raises `RecipeError` suggesting the nearest name."""
    by_name = {path.stem: path for path in shipped()}
    if recipe := by_name.get(str(name_or_path)):
        return recipe
    path = Path(name_or_path)
    if path.is_file():
        return path
    near = difflib.get_close_matches(path.stem, by_name, n=1)
    raise RecipeError(
        f"recipe {name_or_path}: there is no such file, and no recipe of this name comes with Vitrine"
        + (f"; did you mean {near[0]}?" if near else "; see `vitrine recipes` for a list")
    )


def costs_of(recipe: Recipe, data_root: Path) -> Costs | str:
    """The estimate, or the reason why there is none."""
    try:
        return estimate(recipe, data_root)
    except UnknownShape as error:
        return str(error)


def describe(path: Path, data_root: Path, share: float) -> dict[str, Any]:
    """One recipe and its costs for `--json`: numbers in bytes, FLOPs and hours; None where unknown."""
    recipe = load_recipe(path)
    costs = costs_of(recipe, data_root)
    fields: dict[str, Any] = {
        "name": recipe.name,
        "path": str(path),
        "clip": recipe.clip.name or recipe.clip.config,
        "data": recipe.data.name,
        "kind": recipe.kind,
        "sparsifier": recipe.dictionary.sparsifier,
        "cross_layer": recipe.clt.cross_layer if isinstance(recipe, CltRecipe) else None,
        "features": recipe.dictionary.features,
        "k": list(recipe.dictionary.k),
    }
    if isinstance(costs, str):
        return {**fields, "costs": None, "unknown": costs}
    return {
        **fields,
        "costs": {
            "parameters": costs.architecture.parameters,
            "images": costs.images,
            "tokens_an_image": costs.clip.tokens,
            "memory_bytes": {**costs.memory, "total": costs.total_memory},
            "step": [part._asdict() for part in costs.step],
            "flops": costs.flops,
            "bytes": costs.bytes,
            "cache_bytes": costs.cache,
            "share_of_peak": share,
            "hours": {gpu.name: costs.hours(gpu, share) for gpu in GPUS},
            "fits": {gpu.name: costs.fits(gpu) for gpu in GPUS},
        },
    }


def print_list(data_root: Path, share: float, console: Console) -> None:
    """Print all shipped recipes, one per line; a narrow terminal omits columns that the recipe names imply."""
    recipes = [(recipe, costs_of(recipe, data_root)) for recipe in map(load_recipe, shipped())]
    table = _list_table(recipes, share, wide=True)
    if console.measure(table, options=console.options.update(width=1000)).maximum > console.width:
        table = _list_table(recipes, share, wide=False)
    show(table, console)
    _explain(share, console)
    for recipe, costs in recipes:
        if isinstance(costs, str):
            console.print(f"{UNKNOWN}  {recipe.name}: {costs}", soft_wrap=True, highlight=False, markup=False)


def _list_table(recipes: list[tuple[Recipe, Costs | str]], share: float, wide: bool) -> Table:
    table = _table("recipe", *(("CLIP", "data", "sparsifier") if wide else ()))
    for heading in (
        "F",
        "k",
        "M params" if wide else "M",
        "GiB",
        "PFLOP",
        *(f"h {gpu.name}" if wide else gpu.name.replace(" ", "\n") for gpu in GPUS),
    ):
        table.add_column(heading, justify="right")
    for recipe, costs in recipes:
        dictionary = recipe.dictionary
        per_layer = isinstance(recipe, CltRecipe) and not recipe.clt.cross_layer
        is_clt = isinstance(recipe, CltRecipe)
        sparsifier = dictionary.sparsifier + (", per layer" if per_layer else "" if is_clt else ", SAEs")
        table.add_row(
            recipe.name,
            *((recipe.clip.name or "its own", recipe.data.name, sparsifier) if wide else ()),
            _bounds(dictionary.features, wide),
            _bounds(dictionary.k, wide),
            *([UNKNOWN] * (3 + len(GPUS)) if isinstance(costs, str) else _numbers(costs, share)),
        )
    return table


def _bounds(numbers: int | tuple[int, ...], wide: bool = True) -> str:
    """The least and the most, if they differ; the most alone where there is little room."""
    numbers = (numbers,) if isinstance(numbers, int) else numbers
    bounds = sorted({min(numbers), max(numbers)})
    return "–".join(f"{bound:,}" for bound in bounds) if wide or len(bounds) == 1 else f"≤{bounds[1]:,}"


def print_one(path: Path, data_root: Path, share: float, console: Console) -> None:
    """Print one recipe in detail."""
    recipe = load_recipe(path)
    costs = costs_of(recipe, data_root)
    plain: dict[str, Any] = {"soft_wrap": True, "highlight": False, "markup": False}
    console.print(recipe.name, style="bold", **plain)
    console.print(path, **plain)
    if isinstance(costs, str):
        console.print(f"costs unknown: {costs}", **plain)
        return
    shape, clip = costs.architecture, costs.clip
    console.print(
        f"{clip.layers} layers of width {shape.width}, {clip.tokens} tokens per image; {_bounds(features(shape))} "
        f"features {'per layer' if isinstance(recipe, CltRecipe) else 'per SAE'}, {shape.sparsifier}; "
        f"{_millions(shape.parameters)} parameters trained, the CLIP has {_millions(clip.parameters)}",
        **plain,
    )
    images = "an unknown number of" if costs.images is None else f"{costs.images:,}"
    settings = recipe.training
    console.print(
        f"{settings.epochs} epochs of {images} images, {settings.images_per_step * clip.tokens:,} tokens per step",
        **plain,
    )
    show(_memory_table(costs), console)
    show(_step_table(costs.step), console)
    if costs.images is None:
        console.print("hours: unknown, because the images cannot be counted")
        return
    show(_hours_table(costs, share), console)
    _explain(share, console)
    float32, bfloat16 = (cache_bytes(costs.images, shape, clip, kind) / 1e9 for kind in ("float32", "bfloat16"))
    console.print(f"activation cache, if used: {float32:,.0f} GB as float32, {bfloat16:,.0f} GB as bfloat16", **plain)


def _numbers(costs: Costs, share: float) -> list[str]:
    flops = None if costs.flops is None else costs.flops / 1e15
    hours = [_short(costs.hours(gpu, share)) if costs.fits(gpu) else "–" for gpu in GPUS]
    return [f"{costs.architecture.parameters / 1e6:,.0f}", f"{costs.total_memory / GIB:.1f}", _short(flops), *hours]


def _memory_table(costs: Costs) -> Table:
    table = _table("memory", justify="GiB")
    for name, size in (*costs.memory.items(), ("total", costs.total_memory)):
        table.add_row(name, f"{size / GIB:.2f}")
    return table


def _step_table(step: tuple[Work, ...]) -> Table:
    table = _table("one step", justify="GFLOP")
    table.add_column("GB moved", justify="right")
    for part in step:
        table.add_row(part.name, f"{part.flops / 1e9:,.0f}", f"{part.bytes / 1e9:,.1f}")
    return table


def _hours_table(costs: Costs, share: float) -> Table:
    """Hours by GPU and matmul precision; the recipe's own precision is marked."""
    table = _table("hours of the run")
    for matmul in MATMULS:
        table.add_column(matmul + (" (the recipe's)" if matmul == costs.matmul else ""), justify="right")
    table.add_column("memory", justify="right")
    for gpu in GPUS:
        hours = [_short(costs.hours(gpu, share, matmul)) for matmul in MATMULS]
        table.add_row(gpu.name, *hours, f"{gpu.memory:.0f} GiB" + ("" if costs.fits(gpu) else ": does not fit"))
    return table


def _table(*headings: str, justify: str | None = None) -> Table:
    table = Table(*headings, box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    if justify:
        table.add_column(justify, justify="right")
    return table


def _explain(share: float, console: Console) -> None:
    console.print(
        f"Estimates by counting; nothing was run. M: million parameters. Hours: at {share:.0%} of a GPU's data-sheet "
        f"peak, without the time to decode images; – where its memory is too small.",
        highlight=False,
    )


def _millions(count: int) -> str:
    return f"{count / 1e6:,.0f} M"


def _short(number: float | None) -> str:
    """Two significant digits, or all digits of a large number."""
    if number is None:
        return UNKNOWN
    if number < 0.01:
        return "<.01"
    return f"{number:,.0f}" if number >= 10 else f"{number:.1f}" if number >= 1 else f"{number:.2f}"
