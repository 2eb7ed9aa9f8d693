"""Single keys of a recipe given anew (`--set training.learning_rate=1e-3`), and in what two recipes differ."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from pydantic import BaseModel

from vitrine.models.files.names import printable
from vitrine.training.recipes.recipe import RecipeError

_KEY = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)
_ABSENT = "nothing"
_SHOWN = 80  # characters of a value in a message


def with_settings(tables: dict[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """A recipe's tables with each KEY=VALUE put in, the later ones last; VALUE as TOML has it, KEY with its sections.

    Whether there is such a key is for the recipe to say. Raises `RecipeError` for what is no KEY=VALUE.
    """
    changed = deepcopy(tables)
    for setting in settings:
        key, value = _parsed(setting)
        *sections, last = key.split(".")
        table = changed
        for at, section in enumerate(sections):
            table = table.setdefault(section, {})
            if not isinstance(table, dict):
                raise RecipeError(f"--set {key}: {'.'.join(sections[: at + 1])} is a value and has no keys")
        table[last] = value
    return changed


def _parsed(setting: str) -> tuple[str, Any]:
    key, equals, text = setting.partition("=")
    key = key.strip()
    if not equals or not _KEY.fullmatch(key):
        raise RecipeError(f"--set {printable(setting)}: give KEY=VALUE, such as training.learning_rate=1e-3")
    try:
        read = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise RecipeError(
            f"--set {printable(setting)}: the value is not TOML; text needs quotes, as in --set '{key}=\"text\"'"
        ) from error
    if read.keys() != {"value"}:
        raise RecipeError(f"--set {printable(setting)}: give one KEY=VALUE per --set")
    return key, read["value"]


def differences(old: BaseModel | None, new: BaseModel | None, prefix: str = "") -> list[str]:
    """In which keys a recipe, or a section of it, differs from an older one: "KEY is A there and B here" each."""
    before, now = _flat(old, prefix), _flat(new, prefix)
    pairs = {key: (before.get(key, _ABSENT), now.get(key, _ABSENT)) for key in dict.fromkeys([*before, *now])}
    return [
        f"{key} is {printable(there, _SHOWN)} there and {printable(here, _SHOWN)} here"
        for key, (there, here) in pairs.items()
        if there != here
    ]


def _flat(section: BaseModel | None, prefix: str) -> dict[str, str]:
    """Every key with a value, with its sections, and the value as text."""
    flat: dict[str, str] = {}

    def add(values: dict[str, Any], path: str) -> None:
        for key, value in values.items():
            where = f"{path}.{key}" if path else key
            if isinstance(value, dict) and value:
                add(value, where)
            else:
                flat[where] = _text(value)

    add(section.model_dump(exclude_none=True) if section else {}, prefix)
    return flat


def _text(value: Any) -> str:
    """As a recipe would say it, or nearly."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_text, value))}]" if len(value) != 1 else _text(value[0])
    return f'"{value}"' if isinstance(value, str) else str(value)
