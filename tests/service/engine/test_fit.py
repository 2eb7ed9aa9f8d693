"""Bundles whose parts do not fit are refused by name, by `verify` and at the start, and never by what happens later."""

import asyncio
import threading
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer

from broken import BROKEN, all_bits, content, copy, replace_file, tokenizer, write_manifest
from vitrine.models.bundle.bundle import BundleError, open_bundle
from vitrine.service.answers.reload import RELOAD_ERRORS, Serving
from vitrine.service.engine import labels
from vitrine.service.engine.engine import Engine
from vitrine.service.engine.labels import LabelEncoder
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


def test_a_replacement_graph_that_is_not_finite_is_refused_by_verify_and_on_first_use(bundle_path, tmp_path):
    path = copy(bundle_path, tmp_path / "bundle")
    content("replacement.onnx.data", all_bits)(path)

    def use(path):
        Engine(open_bundle(path), Settings(bundle=path)).replacement.open()

    for load in (verify, use):
        with pytest.raises(RELOAD_ERRORS, match=r"replacement\.onnx.*not finite"):
            load(path)


def test_the_same_bundle_written_anew_is_served(bundle_path, tmp_path):
    """What is refused above is refused for what was changed."""
    path = copy(bundle_path, tmp_path / "bundle")
    write_manifest(path)
    verify(path)
    start(path)


def test_a_tokenizer_is_loaded_once_for_bundles_that_share_it(bundle_path, tmp_path, monkeypatch):
    """Loading holds the GIL for 0.1 s: requests to the bundle in service would wait at every reload."""
    loaded = []

    def from_buffer(raw):
        loaded.append(threading.current_thread())
        return Tokenizer.from_buffer(raw)

    monkeypatch.setattr(labels, "Tokenizer", SimpleNamespace(from_buffer=from_buffer))
    other = copy(bundle_path, tmp_path / "other")
    tokenizer(lambda settings: settings["model"]["vocab"].update({"zzzz": 7}))(other)
    for path, times in ((other, 1), (other, 1), (bundle_path, 2), (bundle_path, 2)):
        start(path)
        assert len(loaded) == times
    assert threading.main_thread() not in loaded  # which has the event loop


def test_files_replaced_after_they_were_verified_are_not_loaded(bundle_path, tmp_path):
    """ONNX Runtime opens them by path."""
    for name in ("vision.onnx", "vision.onnx.data", "text.onnx", "directions.npy", "tokenizer.json"):
        path = copy(bundle_path, tmp_path / name)
        bundle = open_bundle(path)
        replace_file(path / name, (path / name).read_bytes())  # the same bytes: not what was verified all the same
        with pytest.raises(BundleError, match=f"{name} has changed since it was verified"):
            LabelEncoder(Engine(bundle, Settings(bundle=path)), 10)
