"""training/README.md lists every key of a recipe, with the same default and meaning as the code."""

import re

from pydantic_core import PydanticUndefined

from common import ROOT
from vitrine.training.recipes.recipe import (
    BundleSection,
    CascadeSection,
    ClipSection,
    CltSection,
    CltTrainingSection,
    DataSection,
    ResidualSaeSection,
)

SECTIONS = {
    "clip": ClipSection,
    "data": DataSection,
    "clt": CltSection,
    "residual_sae": ResidualSaeSection,
    "training": CltTrainingSection,
    "cascade": CascadeSection,
    "bundle": BundleSection,
}


def format_default(value):
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ", ".join(value)
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) else f"{value:,}"


def test_table_is_the_code():
    text = (ROOT / "training" / "README.md").read_text()
    listed = re.findall(r"^\| `(\w+\.\w+)` \| (.*?) \| (.*) \|$", text, flags=re.MULTILINE)
    expected = [
        (f"{name}.{key}", format_default(field.default), field.description)
        for name, section in SECTIONS.items()
        for key, field in section.model_fields.items()
    ]
    assert listed == expected
