"""Replaying the replacement from a bundle and a folder, against the torch model on the same images."""

import json
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from vitrine.models.account.windows import TOKENS
from vitrine.models.dictionary.replacement import Replacement
from vitrine.models.images.decode import ImageLimits, decode
from vitrine.models.images.frame import to_pixels
from vitrine.models.inputs.errors import InputError
from vitrine.models.inputs.opening import open_inputs
from vitrine.service.engine.engine import Engine
from vitrine.service.engine.labels import LabelEncoder
from vitrine.service.offline.replay import ReplayError, print_replay
from vitrine.service.offline.replay import replay as replay_source
from vitrine.service.operations.settings import Settings

LIMITS = ImageLimits(10_000, 100)
LABELS = ["blue triangle", "green square", "red circle"]


def replay(engine, inputs, limits, **options):
    return replay_source(engine, open_inputs(str(inputs)), limits, **options)


def val_images(data_root):
    return [data_root / "val" / path for path in open_inputs(str(data_root / "val")).paths]


@pytest.fixture(scope="module")
def found(engine, data_root):
    return replay(engine, data_root / "val", LIMITS)


@pytest.fixture(scope="module")
def expected(clip, clt, data_root, bundle):
    """{(first, tokens): log-probabilities [12, 3] of the torch model}, CLIP's own under None; truth [12]."""
    files, labels = val_images(data_root), LABELS
    pixels = torch.stack([clip.transform()(Image.open(file)) for file in files])
    templates = bundle.manifest.text.templates
    directions = clip.logit_scale * clip.encode_labels(labels, list(templates))
    model = Replacement(clip.tower, clt)

    def classify(residual):
        return (torch.nn.functional.normalize(clip.tower.head(residual[:, 0]), dim=-1) @ directions.T).log_softmax(-1)

    logs = {None: classify(clip.tower(pixels).residual_out)}
    for first in range(3):
        for tokens in TOKENS:
            logs[first, tokens] = classify(model(pixels, range(first, 3), tokens).residual)
    return logs, torch.tensor([labels.index(file.parent.name) for file in files])


def test_figures_are_the_torch_models(found, expected, engine):
    logs, truth = expected
    assert (found.images, found.labels, found.unreadable, found.bundle) == (12, LABELS, [], engine.bundle.digest)
    assert found.top1 == pytest.approx((logs[None].argmax(-1) == truth).double().mean().item())
    assert [(row.first, row.tokens) for row in found.rows] == [key for key in logs if key]
    own = logs[None].double()
    for row in found.rows:
        theirs = logs[row.first, row.tokens].double()
        divergence = (own.exp() * (own - theirs)).sum(-1).mean().item()
        assert row.divergence == pytest.approx(divergence, rel=0.05, abs=1e-4)  # decoders store one byte per number
        assert row.top1 == pytest.approx((theirs.argmax(-1) == truth).double().mean().item(), abs=1 / 12 + 1e-9)
        assert row.agreement == pytest.approx((theirs.argmax(-1) == own.argmax(-1)).double().mean().item(), abs=0.09)
    assert max(row.divergence for row in found.rows) > 0.01


def test_accuracies_by_hand(engine, data_root, monkeypatch):
    """Three labels with 4 images each: CLIP takes the second for the first, the replacement takes all for the first,
    but keeps CLIP's prediction where only patches are replaced."""
    manifest = engine.bundle.manifest
    embeddings = LabelEncoder(engine, 3).encode(LABELS, manifest.text.templates)
    truths = []  # one per batch; each batch first comes with nothing replaced

    def replace(pixels, mask):
        if not mask.any():
            first = sum(map(len, truths))
            truths.append(np.arange(first, first + len(pixels)) // 4)
        own = np.where(truths[-1] == 1, 0, truths[-1])
        chosen = np.zeros_like(own) if mask[:, 0].any() else own
        return embeddings[chosen], np.zeros((len(pixels), 2, 3, 3), np.float32)

    monkeypatch.setattr(engine.replacement, "run", replace)
    result = replay(engine, data_root / "val", LIMITS)
    assert result.top1 == pytest.approx(2 / 3)
    for row in result.rows:
        if row.tokens == "patches":
            assert (row.top1, row.agreement, row.divergence) == (result.top1, 1, 0)
        else:
            assert (row.top1, row.agreement) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
            assert row.divergence > 0


def test_matrix_is_the_mean_over_images_of_clip_itself(found, engine, data_root):
    scores = []
    for file in val_images(data_root):
        pixels = to_pixels(decode(file.read_bytes(), LIMITS).image, engine.bundle.manifest.preprocessing, LIMITS)
        scores.append(engine.replacement.run(pixels[None], np.zeros((3, 2), bool))[1][0])
    np.testing.assert_allclose([found.matrix.cls, found.matrix.patches], np.mean(scores, axis=0), rtol=0, atol=1e-5)


def test_images_without_labels_have_no_accuracy(engine, data_root, tmp_path):
    for file in (data_root / "val" / "red circle").iterdir():
        shutil.copy(file, tmp_path)
    result = replay(engine, tmp_path, LIMITS)
    assert result.images == 4
    assert result.labels == list(engine.bundle.manifest.text.labels)
    assert result.top1 is None
    assert all(row.top1 is None and 0 <= row.agreement <= 1 for row in result.rows)


def test_folders_by_wordnet_ids_and_labels_that_no_folder_has(engine, data_root, tmp_path):
    names = {"n01440764": "tench", "n04355933": "sunglasses", "n04356056": "sunglasses"}
    for source, folder in zip(LABELS, names, strict=True):
        shutil.copytree(data_root / "val" / source, tmp_path / folder)
    result = replay(engine, tmp_path, LIMITS)
    assert (result.images, result.labels) == (12, ["tench", "sunglasses"])
    more = replay(engine, tmp_path, LIMITS, labels=["a, b", "sunglasses", "tench"], count=3)
    assert (more.labels, more.top1 is not None) == (["a, b", "sunglasses", "tench"], True)
    with pytest.raises(
        ReplayError, match="these folders are not labels: n04355933, n04356056; name each folder after its label"
    ):
        replay(engine, tmp_path, LIMITS, labels=["tench"])
    shutil.move(tmp_path / "n01440764", tmp_path / "n00005787")
    with pytest.raises(ReplayError, match=r"not labels: n00005787; .* or the WordNet id of one of ImageNet's 1,000"):
        replay(engine, tmp_path, LIMITS)


def test_broken_images_are_named_and_left_out(engine, data_root, tmp_path, capsys):
    shutil.copytree(data_root / "val", tmp_path / "val")
    for name in ("blue triangle/broken.png", "red circle/broken.png", "red circle/notes.txt", "beside.png"):
        (tmp_path / "val" / name).write_bytes(b"\x89PNG\r\n\x1a\nno")
    (tmp_path / "val" / "green square" / ".hidden").write_bytes(b"x")
    (tmp_path / "val" / "no label").mkdir()
    result, clean = replay(engine, tmp_path / "val", LIMITS), replay(engine, data_root / "val", LIMITS)
    for ours, theirs in zip(result.rows, clean.rows, strict=True):  # batches differ, and with them roundings
        assert ours.model_copy(update={"divergence": theirs.divergence}) == theirs
        assert ours.divergence == pytest.approx(theirs.divergence, abs=1e-6)
    assert [line.split(": ", 1)[1] for line in result.unreadable] == ["the PNG image's header is damaged"] * 2
    assert result.unreadable[0].startswith("blue triangle/broken.png: ")
    assert (result.images, result.failed) == (12, {"invalid_image": 2})
    print_replay(result, Console(width=300))
    output = capsys.readouterr().out
    assert "errors: 2 invalid_image (blue triangle/broken.png: the PNG image's header is damaged; red" in output
    for line in (
        "left out, hidden files, or files of an operating system: 1 (green square/.hidden)",
        "left out, not images, judging by their names: 1 (red circle/notes.txt)",
        "left out, images outside the folders of labels: 1 (beside.png)",
        "left out, folders of labels without images (add images, or remove the folders): 1 (no label)",
    ):
        assert line in output


def test_a_sample_is_of_the_seed(engine, data_root):
    seen, run = [], engine.replacement.run

    def noted(pixels, replaced):
        seen.append((pixels, replaced))
        return run(pixels, replaced)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.replacement, "run", noted)
        for seed in (1, 1, 2):
            assert replay(engine, data_root / "val", LIMITS, count=3, seed=seed).images == 3
    first, again, other = (pixels for pixels, replaced in seen if not replaced.any())
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_what_cannot_be_replayed(engine, export_variant, data_root, tmp_path):
    _, bundle = export_variant("relu_topk")
    with pytest.raises(ReplayError, match=r"has no replacement graph; export it with `bundle\.replacement = true`"):
        replay(Engine(bundle, Settings()), data_root / "val", LIMITS)
    with pytest.raises(InputError, match="has no images"):
        replay(engine, tmp_path, LIMITS)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(b"")
    with pytest.raises(ReplayError, match=r"none of 1 images can be used; the first: a/x\.png: the image is empty"):
        replay(engine, tmp_path, LIMITS)


@pytest.mark.parametrize("kind", ["list", "tar", "tar.gz", "pattern"])
def test_every_kind_of_input_gives_the_same_figures(engine, data_root, tmp_path, kind):
    folder = data_root / "val" / "red circle"
    if kind == "list":
        source = tmp_path / "list.txt"
        source.write_text("\n".join(map(str, sorted(folder.iterdir()))))
    elif kind == "pattern":
        source = folder / "*.png"
    else:
        source = tmp_path / f"x.{kind}"
        with tarfile.open(source, "w:gz" if kind == "tar.gz" else "w") as tar:
            for file in sorted(folder.iterdir()):
                tar.add(file, file.name)
    ours, theirs = replay(engine, source, LIMITS, count=3), replay(engine, folder, LIMITS, count=3)
    assert ours == theirs


def test_json_is_what_is_printed(found):
    again = type(found).model_validate(json.loads(found.model_dump_json()))
    assert again == found
