"""A field that no request has: the answer names the one that may be meant, however deep it lies."""

import pytest

from vitrine.service.errors import ServiceError
from vitrine.service.schemas.attribute import AttributeRequest
from vitrine.service.schemas.base import validated
from vitrine.service.schemas.intervene import InterveneRequest


@pytest.mark.parametrize(
    ("shape", "fields", "says"),
    [
        (AttributeRequest, {"label": ["a"]}, "label: no such field; did you mean labels?"),
        (AttributeRequest, {"explain": {"heatmaps": True}}, "explain.heatmaps: no such field; did you mean heatmap?"),
        (AttributeRequest, {"zzz": 1}, "zzz: no such field; the fields are labels, label_set, "),
        (InterveneRequest, {"edits": [{"op": "ablate", "layr": 1}]}, "layr: no such field; did you mean layer?"),
    ],
)
def test_the_nearest_name(shape, fields, says):
    with pytest.raises(ServiceError) as caught:
        validated(shape, fields)
    assert any(says in f"{detail['field']}: {detail['problem']}" for detail in caught.value.details)
