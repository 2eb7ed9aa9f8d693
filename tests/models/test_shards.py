"""Names and members of WebDataset shards."""

import pytest

from vitrine.models.shards import expand_braces


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
        ("{a,b}/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
        ("x-{3..1}.tar", ["x-3.tar", "x-2.tar", "x-1.tar"]),
        ("plain.tar", ["plain.tar"]),
        ("{a", ["{a"]),
    ],
)
def test_braces_expand_as_in_a_shell(pattern, expected):
    assert expand_braces(pattern) == expected
