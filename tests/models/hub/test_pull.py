"""Bundles from a hub: whole and verified, or not at all, and what is wrong in one sentence."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from rich.console import Console

from fake_hub import ask_nobody
from vitrine.models.bundle.bundle import open_bundle
from vitrine.models.bundle.files import BundleError
from vitrine.models.files.errors import FileError
from vitrine.models.hub import pull as pulling
from vitrine.models.hub.address import Address, HubError, parse_address
from vitrine.models.hub.pull import pull

TINY = Address("org/tiny")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "bundles" / "tiny"


@pytest.fixture
def get(out):
    """get(address, digest) -> the pulled bundle; nothing may be left beside it, whatever happens."""

    def run(address=TINY, digest=None):
        try:
            return pull(address, out, Console(file=io.StringIO()), digest)
        finally:
            assert not out.parent.exists() or set(out.parent.iterdir()) <= {out}

    return run


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("text", "address"),
    [("hf-hub:org/name", Address("org/name")), ("hf-hub:o.r-g/n_1@refs/pr/3", Address("o.r-g/n_1", "refs/pr/3"))],
)
def test_addresses_are_read_and_written(text, address):
    assert parse_address(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    "text",
    ["org/name", "hf-hub:name", "hf-hub:a/b/c", "hf-hub:", "hf-hub:org/../x", "hf-hub:org/na me", "https://hub/org/name",
     "hf-hub:org/name@", "hf-hub:org/name@a..b", "hf-hub:org/name@/etc", "hf-hub:org/name@../x"],
)  # fmt: skip
def test_what_is_no_address_is_refused(text):
    with pytest.raises(HubError, match=r"is not the address of a repository|is not a branch, tag or commit"):
        parse_address(text)


def test_a_pulled_bundle_is_the_one_that_was_pushed(hub, get, out, bundle, bundle_path):
    hub.put("org/tiny", bundle_path)
    pulled = get(digest=bundle.digest)
    assert (pulled.digest, pulled.path) == (bundle.digest, out)
    assert contents(out) == contents(bundle_path)
    assert not [path for path in out.rglob("*") if path.is_symlink()]
    pulled.check_unchanged()


def test_only_what_the_manifest_lists_is_taken(hub, get, out, bundle_path):
    extra = {"stray.onnx.data": b"x", "README.md": b"# x", "../outside": b"x"}
    hub.commit("org/tiny", contents(bundle_path) | extra)
    get()
    assert contents(out) == contents(bundle_path)


def test_a_revision_is_of_one_commit_whatever_is_pushed_meanwhile(hub, get, bundle, bundle_path):
    hub.put("org/tiny", bundle_path, "v1")
    hub.commit("org/tiny", {"manifest.json": b"{}"})
    get(Address("org/tiny", "v1"))
    (commit,) = {path.split("/")[4] for _, path in hub.requests if not path.endswith("manifest.json")}
    assert commit == hub.branches["org/tiny"]["v1"]
    with pytest.raises(HubError, match=r"hf-hub:org/tiny@v2: the repository has no such branch, tag or commit"):
        pull(Address("org/tiny", "v2"), Path("elsewhere"), Console())


def test_what_was_downloaded_is_not_downloaded_again(hub, get, out, bundle, bundle_path):
    hub.put("org/tiny", bundle_path)
    last = list(bundle.manifest.files)[-1]
    hub.answers[last] = (403, "")
    with pytest.raises(HubError, match="answers 403"):
        get()
    assert not out.exists()
    hub.answers.clear()
    first, again = hub.downloads(), len(hub.downloads())
    get()
    assert hub.downloads()[again:] == [f"{last}"]
    assert set(first) == {"manifest.json", *bundle.manifest.files} - {last}


def test_without_a_network_the_cache_is_enough_if_it_is_whole(hub, get, out, monkeypatch, bundle, bundle_path):
    hub.put("org/tiny", bundle_path)
    get()
    shutil.rmtree(out)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert get().digest == bundle.digest
    assert len(hub.requests) == asked
    shutil.rmtree(out)
    next(Path(constants.HF_HUB_CACHE).glob("*/snapshots/*/fold.npy")).unlink()
    with pytest.raises(HubError, match=r"is missing or incomplete in the cache .*, and HF_HUB_OFFLINE"):
        get()
    with pytest.raises(HubError, match=r"^hf-hub:org/other is missing or incomplete in the cache"):
        get(Address("org/other"))


def test_a_hub_that_cannot_be_reached(hub, get, monkeypatch):
    ask_nobody(monkeypatch)
    with pytest.raises(HubError, match=r"http://127.0.0.1:9 cannot be reached: .*[Cc]onnect"):
        get()


# What is wrong


def test_another_digest_than_asked_for_is_refused_before_the_download(hub, get, out, bundle, bundle_path):
    hub.put("org/tiny", bundle_path)
    with pytest.raises(HubError, match=f"its digest is {bundle.digest}, not sha256:0000"):
        get(digest="sha256:" + "0" * 64)
    assert hub.downloads() == ["manifest.json"]
    with pytest.raises(HubError, match="is not a digest"):
        get(digest="c1532bca")


@pytest.mark.parametrize(
    ("code", "problem"),
    [((404, "EntryNotFound"), "has no fold.npy, which its manifest.json lists"),
     ((403, "GatedRepo"), r"hf-hub:org/tiny\S* is gated: ask its owner .* HF_TOKEN"),
     ((401, ""), r"HF_TOKEN")],
)  # fmt: skip
def test_a_file_that_is_missing_or_not_given(hub, get, out, bundle_path, code, problem):
    hub.put("org/tiny", bundle_path)
    hub.answers["fold.npy"] = code
    with pytest.raises(HubError, match=problem):
        get()
    assert not out.exists()


def test_a_repository_that_is_not_there_or_no_bundle(hub, get, out):
    with pytest.raises(
        HubError, match=r"^hf-hub:org/tiny: the hub has no such repository, or you have no access to it"
    ):
        get()
    hub.commit("org/tiny", {"model.safetensors": b"x"})
    with pytest.raises(HubError, match=r"^hf-hub:org/tiny is not a bundle: it has no manifest\.json$"):
        get()
    hub.commit("org/tiny", {"manifest.json": b'{"name": "something else"}'})
    with pytest.raises(
        BundleError, match=r"^hf-hub:org/tiny/manifest\.json is not a JSON object with a format_version"
    ):
        get()
    assert not out.exists()


@pytest.mark.parametrize("change", [lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: data + b"x"])
def test_a_file_that_is_not_the_manifests(hub, get, out, bundle_path, change):
    files = contents(bundle_path)
    hub.commit("org/tiny", files | {"fold.npy": change(files["fold.npy"])})
    with pytest.raises(BundleError, match=r"^hf-hub:org/tiny/fold\.npy .* the manifest.*; the copy in .* delete it"):
        get()
    assert not out.exists()


@pytest.mark.parametrize("name", ["../outside.npy", "/tmp/outside.npy", "a/../../outside.npy", "..\\outside.npy"])
def test_a_name_that_leaves_the_bundle(hub, get, out, bundle_path, name):
    files = contents(bundle_path)
    manifest = json.loads(files["manifest.json"])
    manifest["files"][name] = manifest["files"]["fold.npy"]
    hub.commit("org/tiny", files | {"manifest.json": json.dumps(manifest).encode(), name: files["fold.npy"]})
    with pytest.raises(
        BundleError, match=rf"^hf-hub:org/tiny/manifest\.json: .*{re.escape(repr(name))} points outside the bundle"
    ):
        get()
    assert hub.downloads() == ["manifest.json"]
    assert not out.exists()


def test_no_room_is_known_before_the_download(hub, get, monkeypatch, bundle, bundle_path):
    hub.put("org/tiny", bundle_path)
    total = sum(entry.bytes for entry in bundle.manifest.files.values())
    usage = type("Usage", (), {"free": 2 * total - 1})  # cache and bundle
    monkeypatch.setattr(pulling.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        HubError,
        match=r"has too little space: hf-hub:org/tiny@\w{40} needs [\d.]+ MB there, but only [\d.]+ MB are free",
    ):
        get()
    assert hub.downloads() == ["manifest.json"]
    usage.free = 2 * total
    get()


def test_what_the_disk_refuses_names_the_place(hub, get, out, bundle_path, monkeypatch):
    hub.put("org/tiny", bundle_path)
    out.parent.mkdir()

    def full(source, target):
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(pulling.shutil, "copyfile", full)
    with pytest.raises(FileError, match=r"bundles/tiny cannot be written: No space left on device; free some space"):
        get()
    assert not out.exists()


def test_a_place_that_is_taken_stays_as_it_is(hub, get, out, bundle_path):
    hub.put("org/tiny", bundle_path)
    out.mkdir(parents=True)
    with pytest.raises(HubError, match="already exists, and a bundle is never changed"):
        get()
    assert not hub.requests
    assert not list(out.iterdir())


def test_a_link_into_nowhere_is_no_free_place(hub, get, out):
    out.parent.mkdir()
    out.symlink_to("nowhere")
    with pytest.raises(HubError, match="exists"):
        get()


def test_open_bundle_reads_what_was_pulled(hub, get, out, bundle, bundle_path):
    hub.put("org/tiny", bundle_path)
    assert get() == open_bundle(out)
