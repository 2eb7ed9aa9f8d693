"""Bundles whose parts do not fit are refused by name, by `verify` and at the start, and never by what happens later."""

import asyncio

import pytest

from broken import BROKEN, copy, write_manifest
from vitrine.service.answers.reload import RELOAD_ERRORS, Serving
from vitrine.service.offline.verify import verify
from vitrine.service.operations.settings import Settings


def start(path):
    async def serve():
        async with Serving(Settings(bundle=path)):
            pass

    asyncio.run(serve())


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_fit_is_refused_by_name(bundle_path, tmp_path, case):
    change, words = BROKEN[case]
    path = copy(bundle_path, tmp_path / "bundle")
    change(path)
    for load in (verify, start):
        with pytest.raises(RELOAD_ERRORS) as caught:
            load(path)
        message = str(caught.value)
        assert not [word for word in words if word not in message], message
        assert len(message) < 1_000


def test_the_same_bundle_written_anew_is_served(bundle_path, tmp_path):
    """What is refused above is refused for what was changed."""
    path = copy(bundle_path, tmp_path / "bundle")
    write_manifest(path)
    verify(path)
    start(path)
