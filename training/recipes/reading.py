"""Recipes from files: every wrong key is named, with the nearest valid one."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from vitrine.models.files.names import printable
from vitrine.training.recipes.image_sources import WebDatasetSource
from vitrine.training.recipes.recipe import CltRecipe, Recipe, RecipeError, ResidualSaeRecipe, kind_of
from vitrine.training.recipes.settings import with_settings

KINDS: dict[str, type[CltRecipe] | type[ResidualSaeRecipe]] = {"clt": CltRecipe, "residual_sae": ResidualSaeRecipe}
Model = TypeVar("Model", bound=BaseModel)
RecipeT = TypeVar("RecipeT", bound=Recipe)


def load_recipe(path: Path, settings: Sequence[str] = ()) -> CltRecipe | ResidualSaeRecipe:
    """Read and validate a recipe, with these KEY=VALUE put in. Raises `RecipeError` naming every wrong key and the
    nearest valid one."""
    tables = with_settings(_tables(path), settings)
    kind = kind_of(tables)
    if kind not in tuple(KINDS):  # it may be a list
        raise RecipeError(f"recipe {path}:\n  kind: {printable(repr(kind))} is not one of {', '.join(KINDS)}")
    return _validated(path, tables, KINDS[kind])


def read_toml(path: Path, kind: type[Model], settings: Sequence[str] = ()) -> Model:
    """Validate a TOML file, with these KEY=VALUE put in, as `kind`. Raises `RecipeError` as `load_recipe` does."""
    return _validated(path, with_settings(_tables(path), settings), kind)


def skip_broken_shards(recipe: RecipeT) -> RecipeT:
    """The recipe with shards that are damaged or missing gone past. Raises `RecipeError` if it reads no shards."""
    sources = {
        name: source for name in ("train", "val") if isinstance(source := getattr(recipe.data, name), WebDatasetSource)
    }
    if not sources:
        raise RecipeError(
            f'{recipe.name} reads no shards, so none can be skipped; only data of kind = "webdataset" has shards'
        )
    changed = {name: source.model_copy(update={"skip_broken": True}) for name, source in sources.items()}
    return recipe.model_copy(update={"data": recipe.data.model_copy(update=changed)})


def _tables(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise RecipeError(f"recipe {path} does not exist") from error
    except OSError as error:
        raise RecipeError(f"recipe {path} cannot be read: {error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RecipeError(f"recipe {path} is not TOML: {error}") from error


def _validated(path: Path, tables: dict[str, Any], kind: type[Model]) -> Model:
    try:
        return kind.model_validate(tables)
    except ValidationError as error:
        lines = [_explain(kind, problem["loc"], problem["type"], problem["msg"]) for problem in error.errors()]
        lines = [printable(line, 400) for line in lines]  # a key may be anything
        raise RecipeError(f"recipe {path}:\n  " + "\n  ".join(dict.fromkeys(lines))) from error


def _explain(root: type[BaseModel], location: tuple[int | str, ...], kind: str, message: str) -> str:
    section, path, index = root, [], 0
    while index < len(location) - 1:
        part = str(location[index])
        path.append(part)
        inner = _models(section.model_fields[part].annotation) if part in section.model_fields else []
        if len(inner) > 1:  # a union: pydantic inserts the chosen member's tag
            index += 1
            inner = [model for model in inner if get_args(model.model_fields["kind"].annotation) == (location[index],)]
        if inner:
            section = inner[0]
        index += 1
    key = str(location[-1])
    where = ".".join([*path, key] if index < len(location) else path)
    if kind != "extra_forbidden":
        return f"{where}: {message}"
    if other := _kind_with(root, [*path, key]):
        return f'{where}: this key requires a recipe of kind = "{other}"'
    near = difflib.get_close_matches(key, section.model_fields, n=1, cutoff=0.5)
    return f"{where}: no such key" + (
        f"; did you mean `{near[0]}`?" if near else f" (keys: {', '.join(section.model_fields)})"
    )


def _kind_with(root: type[BaseModel], path: list[str]) -> str | None:
    """The other kind of recipe that has a key."""
    for name, kind in KINDS.items():
        section: type[BaseModel] | None = kind if root in KINDS.values() and root is not kind else None
        for part in path[:-1]:
            inner = _models(section.model_fields[part].annotation) if section and part in section.model_fields else []
            section = inner[0] if len(inner) == 1 else None
        if section and path[-1] in section.model_fields:
            return name
    return None


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a field may contain."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models(inner)]
