"""`vitrine cards`: from a checkpoint, its bundle and its data to a bundle with cards."""

import io
import json
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from vitrine.commands import app
from vitrine.models.bundle.bundle import BundleError, open_bundle
from vitrine.models.bundle.sealing import seal
from vitrine.training.cards import labels
from vitrine.training.cards.build import STATE, CardsBuildError, Options, build_cards
from vitrine.training.cards.survey import Survey
from vitrine.training.data.images import DataError

OPTIONS = Options(images=40, exemplars=4, shown=3, references=20, codes=30, workers=0, batch_size=16)
QUIET = Console(quiet=True)


@pytest.fixture
def build(clip, checkpoint, bundle, data_root, tmp_path):
    """build(**options) -> the bundle with cards, in `tmp_path / "out"`."""

    def make(bundle=bundle, **options):
        return build_cards(clip, checkpoint, bundle, data_root, tmp_path / "out", replace(OPTIONS, **options), QUIET)

    return make


def test_the_command(checkpoint, bundle_path, data_root, tmp_path):
    options = [
        "--images",
        30,
        "--vocabulary",
        "labels",
        "--vocabulary",
        "colours",
        "--pictures",
        "means",
        "--workers",
        0,
    ]
    arguments = ["cards", "--checkpoint", checkpoint, "--bundle", bundle_path, "--data-root", data_root]
    result = CliRunner().invoke(app, [str(a) for a in [*arguments, "--out", tmp_path / "out", *options]])
    assert result.exit_code == 0, result.output
    cards = open_bundle(tmp_path / "out").manifest.cards
    assert (cards.images, cards.vocabulary, cards.pictures, cards.references) == (30, 22, "means", 30)
    assert "features have a label" in result.output
    assert not (tmp_path / "out.partial").exists()
    again = CliRunner().invoke(app, [str(a) for a in [*arguments, "--out", tmp_path / "out", *options]])
    assert (again.exit_code, "already exists" in again.output) == (1, True)
    wrong = CliRunner().invoke(app, [str(a) for a in [*arguments, "--out", "x", "--pictures", "all"]])
    assert wrong.exit_code == 2


def test_everything_else_of_the_bundle_stays_as_it_was(carded, bundle):
    before, after = bundle.manifest, carded.manifest
    for name, entry in before.files.items():
        assert name == "MODEL_CARD.md" or after.files[name] == entry
    assert after.model_copy(update={"cards": None, "files": {}}) == before.model_copy(update={"files": {}})
    assert carded.digest != bundle.digest
    assert open_bundle(carded.path) == carded
    assert "## Feature cards" in (carded.path / "MODEL_CARD.md").read_text()


def test_cards_are_of_the_features_that_fire(carded, clip, clt, data_root):
    """The exemplar of a feature, forwarded by itself, has that activation and that mask."""
    transform, cards = clip.transform(), carded.cards
    shown = 0
    for layer in range(3):
        for index in range(64):
            card = cards.card(layer, index)
            images = cards.images([exemplar.image for exemplar in card.exemplars])
            for exemplar, image in list(zip(card.exemplars, images, strict=True))[:1]:
                with Image.open(data_root / image.name) as opened:
                    pixels = transform(opened.convert("RGB"))[None]
                mlp_in = clip.tower(pixels).mlp_in[layer, 0]
                is_cls = np.arange(len(mlp_in)) == 0
                code = clt.encoders[layer](mlp_in, mlp_in.new_tensor(is_cls).bool())
                fires = (code.values * (code.indices == index)).sum(1)
                read = fires[0] if card.read_at == "cls" else fires[1:].max()
                assert exemplar.activation == pytest.approx(float(read), rel=1e-4)
                mask = np.frombuffer(exemplar.mask, np.uint8) * card.mask_scale / 255
                assert mask == pytest.approx(fires[1:].numpy(), abs=card.mask_scale / 200)
                assert image.name.startswith(f"train/{image.class_name}/")
                shown += 1
    assert shown > 60


def test_statistics_fit_one_another(carded):
    for layer in range(3):
        for index in range(64):
            card = carded.cards.card(layer, index)
            counted = round(card.frequency_cls * 48)
            assert card.read_at == ("cls" if counted >= 4 else "patches")
            if card.read_at == "cls":
                assert sum(card.histogram) == counted
                assert card.largest == pytest.approx(card.exemplars[0].activation)
            strengths = [exemplar.activation for exemplar in card.exemplars]
            assert strengths == sorted(strengths, reverse=True)
            assert card.quantiles == sorted(card.quantiles)
            assert (card.label is None) == (card.abstained is not None)
            if card.abstained == "too_few_exemplars":
                assert card.label_score is None


@pytest.mark.parametrize(("batches", "how"), [(2, "killed"), (6, "told")])  # of exemplar images, of held-out ones
def test_an_interrupted_call_is_resumed_to_the_same_bundle(build, tmp_path, monkeypatch, batches, how):
    """Killed after each batch was saved; told by a signal to stop, which saves."""
    whole = build(batch_size=8)
    shutil.rmtree(tmp_path / "out")
    add, seen = Survey.add, []

    def interrupted(self, *batch):
        if len(seen) == batches and how == "killed":
            raise KeyboardInterrupt
        add(self, *batch)
        seen.append(len(batch[-1]))
        if len(seen) == batches and how == "told":
            signal.raise_signal(signal.SIGTERM)

    if how == "killed":
        monkeypatch.setattr("vitrine.training.cards.survey.SAVE_EVERY_SECONDS", 0)
    monkeypatch.setattr(Survey, "add", interrupted)
    with pytest.raises(KeyboardInterrupt) as ended:
        build(batch_size=8)
    if how == "told":
        assert (
            str(ended.value) == "stopped by SIGTERM: run the same command again to continue with the remaining images"
        )
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial" / STATE).exists()
    monkeypatch.setattr(Survey, "add", lambda self, *batch: (seen.append(len(batch[-1])), add(self, *batch)))
    assert build(batch_size=8).digest == whole.digest
    assert sum(seen) == 40 + 12, "no image twice, none left out"


@pytest.mark.parametrize("pictures", ["thumbnails", "means", "none"])
def test_pictures_are_a_choice(build, pictures):
    built = build(pictures=pictures)
    cards = [built.cards.card(layer, index) for layer in range(3) for index in range(64)]
    means = [card.mean_picture for card in cards if card.mean_picture]
    images = built.cards.images(sorted({exemplar.image for card in cards for exemplar in card.exemplars}))
    thumbnails = [image.picture for image in images if image.picture]
    # a mean of fewer exemplars would reveal them
    full = [card.label_clarity is not None for card in cards]
    assert [card.mean_picture is not None for card in cards] == [pictures == "means" and enough for enough in full]
    assert 20 < sum(full) < len(full)
    assert len(thumbnails) == (len(images) if pictures == "thumbnails" else 0)
    for picture in [*means, *thumbnails][:5]:
        assert Image.open(io.BytesIO(picture)).size == (32, 32)


def test_random_weights_earn_no_label(build):
    """With the actual thresholds: six images are too few to check anything, so nothing is labelled."""
    built = build()
    assert built.manifest.cards.thresholds == {"cls": None, "patches": None}
    assert built.manifest.cards.quality.labelled == 0
    assert built.manifest.cards.quality.auroc_share is None
    assert built.cards.search(None, None, 0, 10) == (0, [])


def test_the_summary_counts_what_the_cards_say(carded):
    quality = carded.manifest.cards.quality
    total, entries = carded.cards.search(None, None, 0, 100)
    assert quality.labelled == total == sum(1 for _ in entries) > 0
    assert quality.held_out_images == 6


def test_label_quality_is_measured_on_images_that_calibrated_nothing(build, monkeypatch):
    """With one image enough for measuring, the share in the manifest is that of the labels' own AUROC."""
    monkeypatch.setattr("vitrine.training.cards.quality.MIN_IMAGES", 1)
    for name, lax in (("PRECISION", 0.0), ("MIN_LABELS", 0), ("RANDOM_QUANTILE", 0.0)):
        monkeypatch.setattr(labels, name, lax)
    monkeypatch.setattr(labels, "chance", lambda fires, words: np.zeros(fires.shape[1]))
    built = build()
    _, entries = built.cards.search(None, None, 0, 1000)
    aurocs = [line.label_auroc for line in entries if line.label_auroc is not None]
    quality = built.manifest.cards.quality
    assert (quality.measured, quality.labelled) == (len(aurocs), len(entries))
    assert quality.auroc_share == pytest.approx(np.mean([auroc >= 0.8 for auroc in aurocs]))


def test_another_bundle_is_refused(build, bundle, bundle_path, tmp_path):
    other = shutil.copytree(bundle_path, tmp_path / "other")
    directions = np.load(other / "directions.npy")
    directions[1, 3, 5] += 1
    np.save(other / "directions.npy", directions)
    with pytest.raises(CardsBuildError, match="not exported from this checkpoint"):
        build(seal(other, bundle.manifest))
    assert not (tmp_path / "out.partial").exists()


def test_damaged_images_are_skipped_and_named_by_their_replacement(
    clip, checkpoint, bundle, data_root, tmp_path, recipe
):
    root = shutil.copytree(data_root, tmp_path / "data")
    broken = sorted((root / "train").rglob("*.png"))[7]
    broken.write_bytes(b"no image")
    options = replace(OPTIONS, images=48, references=48)
    built = build_cards(clip, checkpoint, bundle, root, tmp_path / "out", options, QUIET)
    names = [image.name for image in built.cards.images(range(48))]
    assert broken.relative_to(root).as_posix() not in names
    assert len(set(names)) == 47
    for path in sorted((root / "train").rglob("*.png"))[:3]:
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match="cannot be read"):
        build_cards(clip, checkpoint, bundle, root, tmp_path / "again", options, QUIET)


def test_a_bundle_without_a_file_of_its_cards_is_refused(carded, tmp_path):
    copy = shutil.copytree(carded.path, tmp_path / "copy")
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["files"]["cards/images.parquet"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"does not list cards/images\.parquet"):
        open_bundle(copy)
