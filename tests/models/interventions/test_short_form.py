"""Interventions in a few words."""

import pytest

from vitrine.models.interventions.changes import InterventionError
from vitrine.models.interventions.short_form import parse


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("ablate 7/123", {"op": "ablate", "layer": 7, "index": 123}),
        ("ablate 7/123 mean patches", {"op": "ablate", "layer": 7, "index": 123, "to": "mean", "tokens": "patches"}),
        ("scale 7/123 -2", {"op": "scale", "layer": 7, "index": 123, "value": -2}),
        ("set 0/0 1.5 cls", {"op": "set", "layer": 0, "index": 0, "value": 1.5, "tokens": "cls"}),
        ("project 7/1 encoder", {"op": "project", "layer": 7, "index": 1, "direction": "encoder"}),
        ("ablate residual 7/1", {"op": "ablate", "layer": 7, "index": 1, "dictionary": "residual"}),
        ("ablate attention 5", {"op": "ablate", "layer": 5, "row": "attention"}),
        ("scale bias 0", {"op": "scale", "row": "bias", "value": 0}),
        ("scale head 5/3 0.5", {"op": "scale", "layer": 5, "head": 3, "value": 0.5}),
        ('{"op": "ablate", "layer": 1, "index": 2, "tokens": [0, 3]}',
         {"op": "ablate", "layer": 1, "index": 2, "tokens": (0, 3)}),
    ],
)  # fmt: skip
def test_what_is_understood(text, fields):
    assert parse(text).model_dump(exclude_unset=True) == fields


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "begin with one of"),
        ("remove 7/1", "begin with one of"),
        ("ablate", "begin with one of"),
        ("ablate 7", "'7' is not LAYER/NUMBER"),
        ("ablate attention", "'' is not a layer"),
        ("ablate head 7", "LAYER/NUMBER"),
        ("scale 7/1", "scale requires a value"),
        ("ablate 7/1 2", "ablate takes no value"),
        ("scale 7/1 2 3", "is not expected"),
        ("scale 7/1 two", "two"),
        ("project bias", "project can only be used with features"),
        ('{"op": ', "Expecting value"),
    ],
)
def test_what_is_not(text, said):
    with pytest.raises(InterventionError) as refused:
        parse(text)
    assert said in str(refused.value)
