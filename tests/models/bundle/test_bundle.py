"""Invalid bundles are refused with an error that names the problem; valid ones read the same for every reader."""

import hashlib
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from common import ROOT
from vitrine.models.bundle.bundle import BundleError, open_bundle
from vitrine.models.bundle.layout import (
    BASELINE,
    BASELINE_STREAM,
    ENCODERS,
    MANIFEST,
    REQUIRED,
    REQUIRED_WITH_FEATURES,
    RERUN,
)
from vitrine.models.bundle.manifest import LayerMetrics, Metrics
from vitrine.models.bundle.model_card import model_card
from vitrine.models.bundle.sealing import seal


@pytest.fixture
def copied(bundle_path, tmp_path):
    """A copy of the bundle that tests may damage."""
    return shutil.copytree(bundle_path, tmp_path / "bundle")


@pytest.fixture
def edit(copied):
    """edit(change): pass the manifest of `copied` through `change`, as a dict."""

    def edit(change):
        manifest = json.loads((copied / MANIFEST).read_text())
        change(manifest)
        (copied / MANIFEST).write_text(json.dumps(manifest))

    return edit


def test_round_trip(bundle, clip, clt, provenance):
    opened = open_bundle(bundle.path)
    assert opened == bundle
    assert hash(opened) == hash(bundle)
    manifest = opened.manifest
    shape, text, identity = manifest.shape, manifest.text, manifest.clip
    assert (shape.layers, shape.width, shape.embedding, shape.tokens) == (3, 32, 24, 17)
    assert (shape.features, shape.k, manifest.sparsifier) == (clt.features, 8, "relu_topk")
    assert (identity.name, identity.weights, identity.sha256) == ("tiny", "tiny.safetensors", clip.sha256)
    assert (text.labels, text.templates, text.context, text.pad) == (provenance.labels, provenance.templates, 16, 0)
    for name in ("name", "description", "data", "metrics", "recipe", "licence"):
        assert getattr(manifest, name) == getattr(provenance, name)
    assert manifest.preprocessing.size == (32, 32)
    assert manifest.logit_scale == pytest.approx(1 / 0.07)


EVERY_REQUIRED = (*REQUIRED, *REQUIRED_WITH_FEATURES)
OPTIONAL = (
    *("attention.npy", "last_decoders.npy", "replacement.onnx", "replacement.onnx.data"),
    *("trace.onnx", "sources.onnx", "sources.onnx.data", "scores.onnx", *BASELINE),
    *(RERUN, ENCODERS, BASELINE_STREAM),
)


def test_manifest_lists_every_file_with_its_checksum(bundle):
    files = {file.name for file in bundle.path.iterdir()} - {MANIFEST}
    assert files == set(bundle.manifest.files) == {*EVERY_REQUIRED, *OPTIONAL}
    for name, entry in bundle.manifest.files.items():
        content = (bundle.path / name).read_bytes()
        assert (entry.bytes, entry.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_tables_are_those_of_tower_and_clt(bundle, clip, clt):
    assert isinstance(bundle.directions, np.memmap)
    np.testing.assert_array_equal(bundle.directions, clt.directions())
    matrix, beta = clip.tower.fold()
    np.testing.assert_array_equal(bundle.fold, matrix)
    np.testing.assert_array_equal(bundle.beta, beta)


@pytest.mark.parametrize("name", EVERY_REQUIRED)
def test_flipped_byte_is_refused(copied, name):
    file = copied / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match=f"{name} does not have the sha256 of the manifest"):
        open_bundle(copied)


@pytest.mark.parametrize("name", EVERY_REQUIRED)
def test_missing_file_is_refused(copied, name):
    (copied / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        open_bundle(copied)


@pytest.mark.parametrize("name", EVERY_REQUIRED)
def test_truncated_file_is_refused(copied, name):
    file = copied / name
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BundleError, match=f"{name} has {size - 1:,} bytes, but the manifest says {size:,}"):
        open_bundle(copied)


@pytest.mark.parametrize("name", EVERY_REQUIRED)
def test_manifest_must_list_every_required_file(copied, edit, name):
    edit(lambda manifest: manifest["files"].pop(name))
    with pytest.raises(BundleError, match=f"manifest.json does not list {name}$"):
        open_bundle(copied)


def test_directory_in_place_of_a_file_is_refused(copied):
    (copied / "fold.npy").unlink()
    (copied / "fold.npy").mkdir()
    with pytest.raises(BundleError, match=r"fold.npy is missing"):
        open_bundle(copied)


@pytest.mark.parametrize("version", [0, 2, 99])
def test_other_format_version_is_refused(copied, edit, version):
    """The error names the version, even though other versions have other fields."""
    edit(lambda manifest: manifest.update(format_version=version, new_field=1))
    with pytest.raises(BundleError, match=f"{copied} has bundle format {version}; .* reads format 1"):
        open_bundle(copied)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "..\\outside"])
def test_file_names_that_leave_the_bundle_are_refused(copied, edit, name):
    edit(lambda manifest: manifest["files"].update({name: manifest["files"]["fold.npy"]}))
    with pytest.raises(BundleError, match="points outside the bundle"):
        open_bundle(copied)


@pytest.mark.parametrize("name", ["", ".", "a//b", "./fold.npy", "a/", "a\nb", "a\0b"])
def test_file_names_that_are_no_plain_paths_are_refused(copied, edit, name):
    edit(lambda manifest: manifest["files"].update({name: manifest["files"]["fold.npy"]}))
    with pytest.raises(BundleError, match="is not a plain path"):
        open_bundle(copied)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda m: m.update(colour="red"), "colour: Extra inputs"),
        (lambda m: m["shape"].update(colour="red"), "shape.colour: Extra inputs"),
        (lambda m: m["shape"].pop("k"), "shape.k: Field required"),
        (lambda m: m["shape"].update(k=0), "shape: Value error, features is 64, k is 0: without a CLT both must be 0"),
        (lambda m: m["shape"].update(k_cls=[]), "shape: Value error, k_cls has 0 numbers for 3 layers"),
        (lambda m: m["shape"].update(k_patches=[8, 8]), "shape: Value error, k_patches has 2 numbers for 3 layers"),
        (lambda m: m.update(sparsifier="magic"), "sparsifier: Input should be 'relu_topk', 'abs_topk', "),
        (lambda m: m["files"]["fold.npy"].update(sha256="abc"), "files.fold.npy.sha256: String should match"),
    ],
)
def test_wrong_field_is_named(copied, edit, change, problem):
    edit(change)
    with pytest.raises(BundleError, match=f"manifest.json: {problem}"):
        open_bundle(copied)


@pytest.mark.parametrize("content", [b"", b"{not json", b"[1]", b"{}", b'{"format_version": "new"}', b"\xff\xfe"])
def test_manifest_that_is_none_is_refused(copied, content):
    (copied / MANIFEST).write_bytes(content)
    with pytest.raises(BundleError, match=r"manifest.json is not a JSON object with a format_version"):
        open_bundle(copied)


def test_empty_directory_is_no_bundle(tmp_path):
    with pytest.raises(BundleError, match=r"manifest.json is missing: .* is not a bundle"):
        open_bundle(tmp_path)


@pytest.mark.parametrize("name", ["nothing", "a-file"])
def test_only_directories_are_bundles(tmp_path, name):
    (tmp_path / "a-file").touch()
    with pytest.raises(BundleError, match=f"{name} is not a directory"):
        open_bundle(tmp_path / name)


def test_digest_is_that_of_the_content(bundle, copied):
    assert bundle.digest == "sha256:" + hashlib.sha256((copied / MANIFEST).read_bytes()).hexdigest()
    assert open_bundle(copied).digest == bundle.digest  # wherever it is stored


@pytest.mark.parametrize("name", [name for name in EVERY_REQUIRED if name != "MODEL_CARD.md"])
def test_digest_changes_with_every_file(bundle, copied, name):
    with (copied / name).open("ab") as file:
        file.write(b" ")
    (copied / MANIFEST).unlink()
    assert seal(copied, bundle.manifest).digest != bundle.digest


def test_digest_changes_with_the_manifest(bundle, copied):
    resealed = seal(copied, bundle.manifest)
    assert resealed.digest == bundle.digest
    manifest = bundle.manifest.model_copy(update={"metrics": Metrics(r2=0.5)})
    assert seal(copied, manifest).digest != bundle.digest


def test_model_card_shows_figures_by_layer(bundle):
    """Of bundles that have them; the embedded one, and older ones, do not."""
    of_kind = LayerMetrics(
        r2=(0.9, 0.5), r2_kept=(0.8, None), relative_error=(0.1, 0.2), cosine=(0.9, 0.8), outliers=(0, 1)
    )
    metrics = Metrics(r2=0.7, r2_worst=0.5, layers=dict.fromkeys(("all", "cls", "patches"), of_kind))
    card = model_card(bundle.manifest.model_copy(update={"metrics": metrics}))
    assert "| r2_worst | 0.5000 |" in card
    assert "| 1 | 0.5000 | – | 0.2000 |" in card
    assert "R² kept" not in model_card(bundle.manifest)


def test_model_card_names_data_metrics_and_recipe(bundle):
    card = (bundle.path / "MODEL_CARD.md").read_text()
    assert card == model_card(bundle.manifest)
    for text in (
        "# tiny",
        "A CLIP with random weights, for tests.",
        "drawn shapes, 48 images; licence of the data: CC0-1.0",
        "12 held-out images",
        "Licence of this bundle**: Apache-2.0",
        "red circle, green square, blue triangle",
        "| r2 | 0.7500 |",
        "| cosine | 0.8750 |",
        bundle.manifest.clip.sha256,
        bundle.manifest.recipe.strip(),
    ):
        assert text in card
    assert "zero_shot_top1 |" not in card  # not measured


def test_manifest_says_what_the_clt_is(any_bundle, exported_clt):
    manifest, architecture = any_bundle.manifest, exported_clt.architecture
    shape, by_rank = manifest.shape, architecture.sparsifier in ("relu_topk", "abs_topk")
    assert manifest.sparsifier == architecture.sparsifier
    assert (shape.k_cls, shape.k_patches) == (architecture.k_cls, architecture.k)
    assert shape.cross_layer == architecture.cross_layer
    assert shape.k == (max(architecture.k_cls) if by_rank else 2 * max(*architecture.k, *architecture.k_cls))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ["relu_topk; active features per token and layer:\n  8 on [CLS], 8 on patches", "cross-layer: each"]),
        ({"k_cls": (2, 4, 8)}, ["2, 4, 8 (by layer) on [CLS], 8 on patches"]),
        ({"k_cls": None, "k_patches": None}, ["8 on [CLS], 8 on patches"]),  # written before there were budgets
        ({"k_patches": (3, 3, 3), "k_cls": (1, 1, 1)}, ["1 on [CLS], 3 on patches"]),
        ({"cross_layer": False}, ["per-layer: each writes to the MLP output of its own layer only"]),
    ],
)
def test_model_card_says_what_the_clt_is(bundle, changes, said):
    shape = bundle.manifest.shape.model_copy(update=changes)
    card = model_card(bundle.manifest.model_copy(update={"shape": shape}))
    assert all(text in card for text in said), card


def test_model_card_names_the_first_of_many_labels(bundle):
    labels = tuple(f"label {number}" for number in range(1_000))
    text = bundle.manifest.text.model_copy(update={"labels": labels})
    card = model_card(bundle.manifest.model_copy(update={"text": text}))
    (line,) = (line for line in card.splitlines() if "Default labels" in line)
    assert line.startswith("- **Default labels**: label 0, label 1, ")
    assert line.endswith(", label 49 and 950 more")


def test_model_card_says_that_thresholds_hold_budgets_on_average(any_bundle):
    sparsifier, k = any_bundle.manifest.sparsifier, any_bundle.manifest.shape.k
    on_average = f"{sparsifier}; active features per token and layer on average (at most {k} when served):"
    assert (on_average in model_card(any_bundle.manifest)) == (sparsifier in ("jumprelu", "batch_topk"))


def test_bundle_older_than_budgets_opens(copied, edit):
    """Like the first embedded bundle: a relu_topk with a single k."""
    edit(lambda manifest: [manifest["shape"].pop(name) for name in ("k_cls", "k_patches", "cross_layer")])
    shape = open_bundle(copied).manifest.shape
    assert (shape.k, shape.k_cls, shape.k_patches, shape.cross_layer) == (8, None, None, True)


def test_embedded_bundle_opens():
    assert open_bundle(ROOT / "models" / "demo").manifest.shape.layers == 12


@pytest.mark.parametrize("module", ["vitrine.models.bundle.bundle", "vitrine.models.account.ledger"])
def test_serving_modules_do_not_import_torch(module):
    code = f"import sys, {module}; sys.exit(bool({{'torch', 'open_clip', 'onnx'}} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_bundle_opens_where_torch_cannot_be_imported(bundle):
    code = f"""
import sys
sys.modules["torch"] = None
from pathlib import Path
from vitrine.models.bundle.bundle import open_bundle
opened = open_bundle(Path({str(bundle.path)!r}))
print(opened.digest, opened.directions.shape, opened.fold.shape, opened.beta.shape)
"""
    finished = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert finished.stdout.split(maxsplit=1) == [bundle.digest, "(3, 64, 32) (32, 24) (24,)\n"]
