"""The tiny bundle with cards, loaded once for all tests that only ask it."""

import pytest

import vitrine


@pytest.fixture(scope="session")
def loaded(carded):
    with vitrine.load(carded.path, decode_threads=1) as explainer:
        yield explainer
