"""Weights from a hub: whole, with the activation that they were trained with, or one sentence that says why not."""

import errno
import json
import logging
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, file_download
from open_clip.transformer import QuickGELU
from safetensors.torch import load_file

from fake_hub import ask_nobody
from faults import fail, largest_file
from vitrine.models.clip.errors import ClipError
from vitrine.models.clip.loading import load_clip

pytestmark = pytest.mark.usefixtures("one_tokenizer")
SMALL = {"text_cfg": {"vocab_size": 64}}  # as conftest's: what it would encode is not asked here
MODEL = "hf-hub:org/model"
SAFE = "open_clip_model.safetensors"


@pytest.fixture
def filled(hub, write_clip, tmp_path):
    """The hub, with weights for both tags and a model that brings its own."""
    config, weights = write_clip(**SMALL)
    data = weights.read_bytes()
    torch.save(load_file(weights), tmp_path / "weights.bin")
    hub.commit("org/small", {SAFE: data})
    hub.commit("org/quick", {"weights.bin": (tmp_path / "weights.bin").read_bytes()})
    content = {"model_cfg": json.loads(config.read_text()), "preprocess_cfg": {"resize_mode": "squash"}}
    hub.commit("org/model", {"open_clip_config.json": json.dumps(content).encode(), SAFE: data})
    return hub


@pytest.fixture(scope="module")
def plain(make_clip):
    """The CLIP that the weights are of, with GELU."""
    return make_clip(**SMALL)


def refused(name="small", weights="gelu"):
    """The one sentence with which a CLIP is refused."""
    with pytest.raises(ClipError) as refusal:
        load_clip(name, weights)
    message = str(refusal.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def blobs():
    return [path for path in Path(constants.HF_HUB_CACHE).glob("models--*/blobs/*") if path.is_file()]


def test_tags_are_downloaded_once_with_their_activation_and_preprocessing(filled, plain, make_clip):
    assert load_clip("small", "gelu").sha256 == plain.sha256
    quick = load_clip("small", "quick")
    assert quick.sha256 == make_clip(quick_gelu=True, **SMALL).sha256
    assert isinstance(quick.tower.blocks[0].mlp.gelu, QuickGELU)
    assert (quick.name, quick.weights) == ("small", "quick")
    assert tuple(quick.preprocess["mean"]) == (0.1, 0.2, 0.3)
    assert filled.downloads() == [SAFE, "weights.bin"]
    load_clip("small", "gelu")
    assert filled.downloads() == [SAFE, "weights.bin"]
    with pytest.raises(ClipError, match=r"^small quick was trained with QuickGELU; omit `quick_gelu`$"):
        load_clip("small", "quick", quick_gelu=False)


def test_a_model_of_the_hub_and_without_a_network(filled, plain, monkeypatch):
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        asked = len(filled.requests)
        loaded = load_clip(MODEL, None)
        assert (loaded.name, loaded.sha256) == (MODEL, plain.sha256)
        assert loaded.preprocess["resize_mode"] == "squash"
        assert (len(filled.requests) == asked) == offline
    for name, weights in ((MODEL, "gelu"), (f"{MODEL}@main", None)):
        assert "omit" in refused(name, weights)


def test_without_a_network_and_not_in_the_cache(filled, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    remedy = f"is missing or incomplete in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids"
    assert refused().startswith(f"small gelu: hf-hub:org/small {remedy}")
    assert refused(MODEL, None).startswith(f"{MODEL} {remedy}")


def test_a_model_whose_weights_are_not_in_the_cache_is_not_random(filled, monkeypatch):
    load_clip(MODEL, None)
    next(Path(constants.HF_HUB_CACHE).glob(f"models--org--model/snapshots/*/{SAFE}")).unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "missing or incomplete in the cache" in refused(MODEL, None)


def test_a_hub_that_cannot_be_reached_is_not_needed_for_what_is_in_the_cache(filled, monkeypatch):
    load_clip("small", "quick")  # whose .safetensors the hub has not
    ask_nobody(monkeypatch)
    assert load_clip("small", "quick").weights == "quick"
    assert re.match(
        r"small gelu: hf-hub:org/small: http://127\.0\.0\.1:9 cannot be reached: .*; check the net", refused()
    )


@pytest.mark.parametrize(
    ("code", "problem"),
    [((403, "GatedRepo"), r"is gated: ask its owner for access on the hub, then log in .* HF_TOKEN"),
     ((401, "RepoNotFound"), r"the hub has no such repository, or you have no access to it; .* HF_TOKEN"),
     ((403, ""), r"answers 403 .*HF_TOKEN"),
     ((503, ""), r"answers 503"),
     ((404, "EntryNotFound"), rf"is not a CLIP for open_clip: it has no {SAFE} and no open_clip_pytorch_model\.bin")],
)  # fmt: skip
def test_weights_that_the_hub_does_not_give(filled, monkeypatch, code, problem):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    filled.answers[SAFE] = code
    for name, weights in (("small", "gelu"), (MODEL, None)):
        assert re.search(problem, refused(name, weights))


def test_a_repository_that_is_not_there(hub):
    assert "hf-hub:org/small: the hub has no such repository, or you have no access to it" in refused()
    assert refused(MODEL, None).startswith(f"{MODEL}: the hub has no such repository")
    hub.commit("org/model", {"config.json": b"{}"})
    assert refused(MODEL, None) == f"{MODEL} is not a CLIP for open_clip: it has no open_clip_config.json"
    assert "is not the address of a repository: write hf-hub:org/name" in refused("hf-hub:model", None)


def test_a_download_that_breaks_off_leaves_nothing_and_can_be_taken_up(filled, monkeypatch, plain):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    filled.cut = {SAFE}
    assert re.match(
        r"small gelu: hf-hub:org/small: .* cannot be reached: .*; check the network, then try again", refused()
    )
    assert not blobs()
    filled.cut = set()
    assert load_clip("small", "gelu").sha256 == plain.sha256


@pytest.mark.parametrize("change", [lambda data: data[:-400], lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_a_file_in_the_cache_that_is_damaged(filled, plain, change):
    load_clip("small", "gelu")
    (blob,) = blobs()
    blob.write_bytes(change(blob.read_bytes()))
    message = refused()
    assert re.match(
        rf"small gelu: \S+/{SAFE} is damaged, its sha256 is wrong; delete {blob}, and start again$", message
    )
    blob.unlink()
    assert load_clip("small", "gelu").sha256 == plain.sha256


def test_a_cache_without_links_whose_file_is_not_whole(filled):
    load_clip("small", "gelu")
    (blob,) = blobs()
    file = next(Path(constants.HF_HUB_CACHE).glob(f"*/snapshots/*/{SAFE}"))
    file.unlink()
    file.write_bytes(blob.read_bytes()[:-400])
    assert re.search(rf"{file} is damaged or incomplete \(.*\); delete {file}, and start again$", refused())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_no_room_for_a_download_names_the_folder(filled, monkeypatch, code):
    fail(monkeypatch, file_download, "http_get", code)
    message = refused()
    assert message.startswith(f"small gelu: {constants.HF_HUB_CACHE} cannot be written: ")
    assert message.endswith(
        "free some space there and start again, or write to another place (HF_HUB_CACHE sets where the cache is)"
    )


def test_a_limit_of_the_kernel_on_a_download(filled):
    with largest_file(10_000):
        assert f"{constants.HF_HUB_CACHE} cannot be written: File too large" in refused()
    assert not blobs()


def test_what_xet_says_is_one_sentence(filled, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("Data processing error: CAS service error\nand much more")

    monkeypatch.setattr(file_download, "http_get", broken)
    assert f"{SAFE} cannot be downloaded (Data processing error: CAS service error); try again" in refused()


def test_a_model_that_does_not_fit_its_configuration_is_no_page(filled, write_clip):
    config, _ = write_clip(**SMALL)
    _, other = write_clip(vision_cfg={"width": 48}, **SMALL)
    content = {"model_cfg": json.loads(config.read_text())}
    hub_files = {"open_clip_config.json": json.dumps(content).encode(), SAFE: other.read_bytes()}
    filled.commit("org/model", hub_files)
    assert re.match(
        rf"open_clip cannot load {MODEL}: Error.*size mismatch for visual.*more lines", refused(MODEL, None)
    )
    filled.commit("org/model", hub_files | {"open_clip_config.json": b'{"model_cfg": {"embed_dim": 3}}'})
    assert refused(MODEL, None).startswith(f"open_clip cannot load {MODEL}: ")


def test_nothing_is_logged_as_random(filled, caplog, write_clip):
    with caplog.at_level(logging.WARNING):
        load_clip("small", "gelu")
        load_clip("single", str(write_clip(**SMALL)[1]))
    assert not caplog.records
    assert logging.root.manager.disable == 0
