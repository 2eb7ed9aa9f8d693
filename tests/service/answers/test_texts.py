"""Limits of the labels and templates of a request."""

from time import perf_counter

import pytest

from vitrine.service.answers.texts import check_texts
from vitrine.service.errors import ServiceError
from vitrine.service.operations.settings import Settings

SETTINGS = Settings(max_labels=4, max_templates=3, max_prompts=6, max_label_chars=40, max_prompt_chars=50)


@pytest.mark.parametrize(
    ("labels", "templates", "problem"),
    [
        (["a"] * 5, ["{}"], "there are 5 labels; at most 4 are accepted"),
        (["a"], ["{}"] * 4, "there are 4 templates; at most 3 are accepted"),
        (["a"] * 4, ["{}", "a {}"], "4 labels in 2 templates make 8 texts; at most 6 are accepted"),
        (["a" * 41], ["{}"], "a label or template has 41 characters; at most 40 are accepted"),
        (["a"], ["{}" + "a" * 39], "a label or template has 41 characters; at most 40 are accepted"),
        (
            ["a", "a" * 26],
            ["{}{}", "{}"],
            "a template filled in with the longest label has 52 characters; at most 50 are",
        ),
        (["a" * 3], ["{}" * 17], "has 51 characters; at most 50 are accepted"),
    ],
)
def test_beyond_a_limit_the_request_is_refused(labels, templates, problem):
    with pytest.raises(ServiceError, match=problem) as caught:
        check_texts(tuple(labels), tuple(templates), SETTINGS)
    assert (caught.value.code, caught.value.status) == ("invalid_request", 400)


@pytest.mark.parametrize(
    ("labels", "templates"),
    [(["a" * 40], ["{}"]), (["a" * 25], ["{}{}"]), (["a"], ["{}" * 20]), (["a" * 13], ["a {} b {} c {} d"])],
)
def test_up_to_the_limits_it_is_taken(labels, templates):
    check_texts(tuple(labels), tuple(templates), SETTINGS)
    assert max(len(template.replace("{}", label)) for template in templates for label in labels) <= 50


def test_the_longest_label_in_a_usual_template_is_taken():
    check_texts(("a" * 256,), ("a photo of a {}, a kind of thing", "{} and {}"), Settings())


def test_checking_the_largest_request_does_not_fill_in_its_templates():
    """16,384 texts of 32 kB each would be half a gigabyte."""
    start = perf_counter()
    with pytest.raises(ServiceError, match="32,512 characters; at most 1,024"):
        check_texts(("a" * 256,) * 128, ("{}" * 127,) * 128, Settings())
    assert perf_counter() - start < 1
