"""`vitrine export --clip`, on a hub cache with a random CLIP; and what the commands say of a bundle without a CLT."""

import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image

from vitrine.commands.common import load_clip_of
from vitrine.models.bundle.bundle import open_bundle
from vitrine.models.clip.loading import load_clip
from vitrine.training.recipes.recipe import ClipSection

NAME = "hf-hub:tiny/clip"
LABELS = ["red circle", "green square", "blue triangle"]


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    monkeypatch.delenv("VITRINE_BUNDLE", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def refused(run):
    """refused(*arguments) -> what a command says that must fail."""

    def invoke(*arguments):
        result = run(*arguments)
        assert result.exit_code != 0
        return " ".join(result.output.split())

    return invoke


@pytest.fixture(scope="module")
def hub(write_clip, tmp_path_factory):
    """A hub's cache, with nothing else to be reached: the tiny CLIP as an open_clip model."""
    root, revision = tmp_path_factory.mktemp("hub"), "0" * 40
    repository = root / "models--tiny--clip"
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(revision)
    config, weights = write_clip()
    content = {"model_cfg": json.loads(config.read_text()), "preprocess_cfg": {}}
    (snapshot / "open_clip_config.json").write_text(json.dumps(content))
    shutil.copy(weights, snapshot / "open_clip_model.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(root))
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield root


@pytest.fixture(scope="module")
def exported(run, hub, conversions, tmp_path_factory):
    """(the command's output, the bundle)."""
    out = tmp_path_factory.mktemp("exported") / "tiny"
    with conversions.remembered():
        result = run("export", "--clip", NAME, "--labels", ",".join(LABELS), "--out", out)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split()), open_bundle(out)


@pytest.fixture
def photo(tmp_path, draw):
    draw().save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_it_says_what_there_is_and_what_is_left_out(exported):
    output, bundle = exported
    assert "int8 and fp16 are left out: there are no --images" in output
    assert "no CLT: accounts have the MLPs' rows but no features" in output
    assert "interventions: direct and rerun" in output
    assert (bundle.manifest.name, bundle.manifest.precisions) == ("hf-hub-tiny-clip-its-own", ("fp32",))
    assert bundle.manifest.text.labels == tuple(LABELS)
    assert bundle.has_sources
    assert bundle.has_scores
    assert bundle.has_rerun


def test_its_answers_are_those_of_open_clip(run, exported, photo):
    _, bundle = exported
    result = run("attribute", photo, "--bundle", bundle.path, "--json")
    answer, clip = json.loads(result.stdout), load_clip(NAME, None)
    with torch.no_grad():
        image = clip.model.encode_image(clip.transform()(Image.open(photo))[None], normalize=True)
        text = clip.encode_labels(LABELS, ["a photo of a {}."])
        expected = (clip.logit_scale * image @ text.T).numpy()[0]
    found = {prediction["label"]: prediction["logit"] for prediction in answer["predictions"]}
    np.testing.assert_allclose([found[label] for label in LABELS], expected, rtol=0, atol=1e-4)


def test_verify_passes_it_and_commands_show_its_rows(run, exported, photo):
    _, bundle = exported
    verified = run("verify", bundle.path)
    assert verified.exit_code == 0, verified.output
    shown = run("attribute", photo, "--bundle", bundle.path, "--sources").output
    assert "MLP 2" in shown
    assert "CLT" not in shown
    assert "Fidelity" not in shown
    changed = run("intervene", photo, "--bundle", bundle.path, "--edit", "ablate mlp 1").output
    assert "MLP 1" in changed


def test_what_is_of_features_is_refused_by_name(refused, exported, photo, data_root, tmp_path):
    _, bundle = exported
    of_bundle = ("--bundle", bundle.path)
    for command in (
        ("circuit", photo, *of_bundle),
        ("replay", data_root / "val", *of_bundle),
        ("attribute", photo, "--graph", tmp_path / "graph.json", *of_bundle),
        ("intervene", photo, "--edit", "ablate 0/3", *of_bundle),
        ("debias", "--data", data_root / "val", "--cue", "red", "--out", tmp_path / "edit.json", *of_bundle),
    ):
        assert "no CLT" in refused(*command), command


@pytest.mark.usefixtures("remembered_conversions")
def test_labels_are_imagenets_and_variants_are_checked_on_images(run, hub, data_root, tmp_path):
    (tmp_path / "photos").mkdir()
    for number, file in enumerate(sorted((data_root / "val").rglob("*.png"))):
        shutil.copy(file, tmp_path / "photos" / f"{number}.png")
    (tmp_path / "photos/broken.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    result = run("export", "--clip", NAME, "--images", tmp_path / "photos", "--calibration-images", "8", "--out", out)
    output = " ".join(result.output.split())
    assert result.exit_code == 0, output
    manifest = open_bundle(out).manifest
    assert len(manifest.text.labels) == 998
    assert manifest.text.labels[:2] == ("tench", "goldfish")
    for variant in ("int8", "fp16"):
        if variant in manifest.precisions:
            assert manifest.agreement[variant].images >= 7
        else:
            assert f"{variant} is left out: it does not agree with float32" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give one of --checkpoint (a CLT), --clip, and --bundle"),
        (("--clip", NAME, "--checkpoint", "runs/x"), "give one of --checkpoint (a CLT), --clip, and --bundle"),
        (("--checkpoint", "runs/x", "--weights", "openai"), "--weights, --quick-gelu and --images require --clip"),
        (("--clip", NAME, "--residual", "runs/x"), "--residual cannot be used with --clip"),
        (("--clip", NAME, "--images", "nowhere"), "nowhere"),
    ],
)
def test_wrong_use_is_refused(refused, hub, tmp_path, arguments, message):
    assert message in refused("export", *arguments, "--out", tmp_path / "out").replace("│ ", "").replace(" │", "")


def test_the_size_is_said_first_and_wrong_weights_are_refused(refused, hub, tmp_path):
    said = refused("export", "--clip", "ViT-B-32", "--weights", "nobody", "--out", tmp_path / "out")
    assert said.startswith("ViT-B-32: 151 million parameters, so 605 MB of weights to download unless")
    assert "weights 'nobody' are neither a file nor one of open_clip's tags" in said
    said = refused("export", "--clip", "ViT-B-32", "--out", tmp_path / "out")
    assert "'VIT-B32'; did you mean ViT-B-32?" in refused("export", "--clip", "VIT-B32", "--out", tmp_path / "out")
    assert "error: ViT-B-32 needs `weights`: one of open_clip's tags, or a file; tags for ViT-B-32: openai, " in said


def test_the_activation_of_a_file_must_be_known_or_said(refused, hub, write_clip, make_clip, data_root, tmp_path):
    config, file = write_clip()
    command = ("export", "--weights", file, "--out", tmp_path / "out", "--clip")
    said = refused(*command, "ViT-B-32")
    assert said.startswith("ViT-B-32: 151 million parameters, so a bundle of up to 650 MB loading ViT-B-32 ")
    assert "error: nothing in" in said
    assert said.endswith("give the name ViT-B-32-quickgelu, for GELU set quick_gelu = false (--no-quick-gelu)")
    said = refused(*command, "ViT-B-32-quickgelu", "--no-quick-gelu")
    assert "error: ViT-B-32-quickgelu has QuickGELU, `quick_gelu` says GELU" in said
    paths = {key: path.relative_to(data_root).as_posix() for key, path in (("config", config), ("weights", file))}
    recipe = SimpleNamespace(clip=ClipSection(**paths, quick_gelu=True))
    assert load_clip_of(recipe, data_root).sha256 == make_clip(quick_gelu=True).sha256


def test_nothing_is_overwritten(refused, hub, tmp_path):
    assert "already exists, and a bundle is never changed" in refused("export", "--clip", NAME, "--out", tmp_path)


def test_images_of_which_none_can_be_read_are_refused(refused, hub, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    message = refused("export", "--clip", NAME, "--images", tmp_path, "--out", tmp_path / "out")
    assert "none of 1 images can be used; the first: broken.png" in message
