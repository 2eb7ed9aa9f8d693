"""The `vitrine` command, run in this process, or in a separate process where that matters."""

import json
import shutil
import signal
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

import duckdb
import numpy as np
import onnx
import pytest
from PIL import Image
from typer.testing import CliRunner

from common import ROOT
from vitrine.commands import app
from vitrine.models.bundle.bundle import open_bundle
from vitrine.models.bundle.sealing import seal
from vitrine.models.stopping import signals_raise
from vitrine.service.schemas.attribute import AttributeResponse

COMMANDS = (
    "pretrain",
    "train",
    "evaluate",
    "recipes",
    "export",
    "cards",
    "verify",
    "serve",
    "doctor",
    "replay",
    "bulk",
    "attribute",
    "intervene",
)
LABELS = ["red circle", "green square", "blue triangle"]


@pytest.fixture(autouse=True)
def no_settings(monkeypatch, bundle_path):
    """The tiny bundle instead of the demo, wide output, none of this machine's other settings."""
    monkeypatch.setenv("VITRINE_BUNDLE", str(bundle_path))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")


@pytest.fixture
def refused(run):
    """refused(*arguments) -> the message of a command that must fail with exit code 1 and one sentence."""

    def invoke(*arguments):
        result = run(*arguments)
        assert result.exit_code == 1, result.output
        assert result.stderr.startswith("error: ")
        assert "Traceback" not in result.output
        return result.stderr

    return invoke


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    Image.radial_gradient("L").convert("RGB").resize((60, 45)).save(path)
    return path


@pytest.fixture
def with_cards(monkeypatch, carded):
    """The tiny bundle with cards instead of the one without."""
    monkeypatch.setenv("VITRINE_BUNDLE", str(carded.path))
    return carded


@pytest.fixture
def damaged(bundle_path, tmp_path):
    """A copy of the bundle, to be damaged."""
    return Path(shutil.copytree(bundle_path, tmp_path / "damaged"))


# Help


def test_help_names_every_command(run):
    result = run("--help")
    assert result.exit_code == 0
    assert all(command in result.output for command in COMMANDS)


@pytest.mark.parametrize("command", ["debias", "train"])
def test_paragraphs_of_help_are_not_broken_where_the_source_is(run, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "1000")
    described = run(command, "--help").output.partition("╭")[0].strip().splitlines()
    assert "Usage" in described[0]
    paragraphs = [line for line in described[1:] if line.strip()]
    assert len(paragraphs) == 2
    assert all(line.rstrip().endswith(".") for line in paragraphs)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_commands_help_has_an_example(run, command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"Example: vitrine {command}" in result.output


def test_the_examples_options_exist(run):
    for command in COMMANDS:
        output = run(command, "--help").output
        example = output[output.index("Example:") :]
        for option in (word for word in example.split() if word.startswith("--")):
            assert f"{option} " in output[: output.index("Example:")], f"{command} {option}"


@pytest.mark.parametrize("arguments", [["nonsense"], ["verify"], ["attribute"], ["verify", "--nonsense", "x"]])
def test_wrong_use_is_reported_and_exits_with_2(run, arguments):
    assert run(*arguments).exit_code == 2


def test_the_command_runs_as_a_process(bundle_path, photo):
    """As installed: a traceback would show here, and the exit code is the process's."""
    root = ROOT
    for arguments, code in ((["verify", bundle_path], 0), (["verify", root], 1)):
        command = [sys.executable, "-m", "vitrine", *map(str, arguments)]
        finished = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=60)
        assert finished.returncode == code
        assert "Traceback" not in finished.stderr + finished.stdout
    assert finished.stderr.startswith("error: ")
    assert "manifest.json is missing" in finished.stderr


# doctor


def test_doctor_says_what_will_be_used_and_why(run, monkeypatch):
    monkeypatch.setenv("VITRINE_THREADS", "1")
    monkeypatch.setenv("VITRINE_PRECISION", "auto")
    result = run("doctor")
    assert result.exit_code == 0
    lines = {line.split()[0]: line for line in result.output.splitlines() if line.strip()}
    assert "CPUExecutionProvider" in lines["provider"]
    assert "VITRINE_PROVIDER=cpu" in lines["provider"]
    assert "fp32" in lines["precision"]
    assert "auto: this CPU has" in lines["precision"]
    assert "VITRINE_THREADS=1" in lines["threads"]
    assert "one image took" in lines["the"]


def test_doctor_names_what_is_not_available(refused, monkeypatch):
    monkeypatch.setenv("VITRINE_PRECISION", "int8")
    assert "VITRINE_PRECISION=int8, but the bundle tiny has only fp32" in refused("doctor")
    assert "VITRINE_PRECISION=int8, but the bundle tiny has only fp32" in refused("serve")


# replay


def test_replay_prints_and_writes_its_figures(run, data_root, tmp_path):
    result = run("replay", data_root / "val", "--images", 6, "--json", tmp_path / "figures.json")
    assert result.exit_code == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["images"], len(figures["rows"])) == (6, 9)
    assert f"6 images, 3 labels; top-1 of the unmodified CLIP {figures['top1']:.2%}" in result.output
    lines = [line.split() for line in result.output.splitlines()]
    for row in figures["rows"]:
        points = 100 * (row["top1"] - figures["top1"])
        numbers = f"{row['top1']:.2%}", f"{points:+.2f}", f"{row['agreement']:.2%}", f"{row['divergence']:.4f}"
        assert [str(row["first"]), "to", "2", row["tokens"], *numbers] in lines


def test_replay_of_nothing_is_refused(refused, tmp_path):
    assert "has no images" in refused("replay", tmp_path)


# verify


def test_verify_accepts_a_good_bundle(run, bundle):
    result = run("verify", bundle.path)
    assert result.exit_code == 0
    assert bundle.manifest.name in result.output
    assert bundle.digest[:19] in result.output


def test_verify_measures_a_precision_on_images(run, refused, bundle, data_root, tmp_path):
    arguments = ("verify", bundle.path, "--precision", "fp32", "--json", tmp_path / "a.json")
    result = run(*arguments, "--images", data_root / "val" / LABELS[0])
    assert result.exit_code == 0
    report = json.loads((tmp_path / "a.json").read_text())
    assert (report["here"]["images"], report["here"]["top1"], report["here"]["top_features"]) == (4, 1, 1)
    assert report["here"]["ledger_cosine"] == pytest.approx(1, abs=1e-5)  # by other kernels, the same sums
    assert "100.0%" in result.output
    assert "has no int8; it has fp32" in refused("verify", bundle.path, "--precision", "int8")
    assert run("verify", bundle.path, "--images", data_root).exit_code == 2  # of what precision?


def test_verify_names_a_replacement_graph_of_another_clip(refused, damaged, bundle):
    """Well-formed and listed, but with the head of another CLIP."""
    model = onnx.load(damaged / "replacement.onnx")
    projection = next(tensor for tensor in model.graph.initializer if tensor.name.startswith("tower.visual.proj"))
    values = onnx.numpy_helper.to_array(projection)
    projection.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(values[::-1]), projection.name))
    onnx.save_model(model, damaged / "replacement.onnx", save_as_external_data=True, location="replacement.onnx.data")
    seal(damaged, bundle.manifest)
    assert "with nothing replaced, the embedding of replacement.onnx differs from that of vision.onnx by" in refused(
        "verify", damaged
    )


@pytest.mark.parametrize(
    "name", ["vision.onnx", "vision.onnx.data", "text.onnx.data", "tokenizer.json", "directions.npy", "MODEL_CARD.md"]
)
def test_verify_names_a_damaged_file(refused, damaged, name):
    file = damaged / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    assert f"{name} does not have the sha256 of the manifest" in refused("verify", damaged)


def test_verify_names_a_truncated_and_a_missing_file(refused, damaged):
    file = damaged / "fold.npy"
    file.write_bytes(file.read_bytes()[:-1])
    assert "fold.npy has" in refused("verify", damaged)
    file.unlink()
    assert "fold.npy is missing" in refused("verify", damaged)


@pytest.mark.parametrize(
    "manifest", [b"", b"{", b"[]", b"\xff\xfe", b'{"format_version": 99}', b'{"format_version": 1}']
)
def test_verify_refuses_a_manifest_that_is_none(refused, damaged, manifest):
    (damaged / "manifest.json").write_bytes(manifest)
    assert "damaged" in refused("verify", damaged)


def test_verify_refuses_what_is_no_bundle(refused, photo, tmp_path):
    assert "not a directory" in refused("verify", photo)
    assert "not a directory" in refused("verify", tmp_path / "nowhere")
    assert "is not a bundle" in refused("verify", tmp_path)


def reseal(path):
    """Rewrites the manifest for changed files, as someone who damages a bundle on purpose would."""
    from vitrine.models.bundle.manifest import Manifest
    from vitrine.models.bundle.sealing import seal

    raw = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").unlink()
    seal(path, Manifest.model_validate(raw))


@pytest.mark.parametrize("name", ["vision.onnx", "text.onnx", "tokenizer.json", "fold.npy", "directions.npy"])
def test_verify_refuses_files_that_cannot_be_used_whatever_the_manifest_says(refused, damaged, name):
    (damaged / name).write_bytes(b"not what it was")
    reseal(damaged)
    assert name in refused("verify", damaged)


@pytest.mark.parametrize("name", ["fold.npy", "directions.npy"])
def test_verify_refuses_tables_that_do_not_fit(refused, damaged, name):
    table = np.load(damaged / name)
    np.save(damaged / name, np.concatenate([table, table[:1]]))
    reseal(damaged)
    assert name in refused("verify", damaged)


# attribute


def test_bulk_writes_tables_and_resumes(run, refused, photo, tmp_path):
    folder, out = tmp_path / "photos", tmp_path / "out"
    folder.mkdir()
    for name in ("a", "c"):
        shutil.copy(photo, folder / f"{name}.png")
    (folder / "b.png").write_bytes(b"broken")
    arguments = ("bulk", folder, "--out", out, "--labels", "cat,dog", "--top-k", 1, "--part-size", 2)
    for _ in range(2):
        assert run(*arguments).output.endswith(f"2 rows and 1 errors in {out}\n")
    with duckdb.connect() as database:
        rows = database.sql(f"SELECT id, name, len(predictions), ledger.target FROM '{out}/part-*.parquet' ORDER BY id")
        (first, second), best = rows.fetchall(), {"cat", "dog"}
        assert (first[:3], second[:3]) == ((0, "a.png", 1), (2, "c.png", 1))
        assert {first[3], second[3]} <= best
        problems = database.sql(f"SELECT name, code FROM '{out}/_errors/*.parquet'").fetchall()
    assert problems == [("b.png", "unsupported_image")]
    assert "was started with other options: top_k was 1 and is now 2" in refused(*arguments, "--top-k", 2)
    (tmp_path / "empty").mkdir()
    assert "has no images" in refused("bulk", tmp_path / "empty", "--out", tmp_path / "other")


SAME = '"Cat" and "cat" are the same text to this CLIP'


def test_commands_warn_of_labels_or_refuse_them(run, refused, photo, tmp_path):
    """Also where a folder names them."""
    for name in ("Cat", "cat"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        shutil.copy(photo, tmp_path / "photos" / name / "a.png")
    bulk = ("bulk", tmp_path / "photos", "--labels", "Cat,dog,cat", "--out", tmp_path / "out")
    assert refused("attribute", photo, "--labels", "Cat,dog,cat", "--strict").startswith(f"error: {SAME}")
    assert refused(*bulk, "--strict").startswith(f"error: {SAME}")
    assert not (tmp_path / "out").exists()
    assert f"warning: {SAME}" in " ".join(run("attribute", photo, "--labels", "Cat,dog,cat").output.split())
    assert run(*bulk).output.startswith(f"warning: {SAME}")
    assert f"warning: {SAME}" in " ".join(run("replay", tmp_path / "photos").output.split())
    assert "warning" not in run("attribute", photo, "--labels", "cat,dog", "--strict").output


def test_bulk_says_what_was_left_out_and_fails_if_nothing_was_answered(run, refused, photo, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "b.png").write_bytes(b"broken")
    (folder / "a.txt").touch()
    message = refused("bulk", folder, "--out", tmp_path / "out")
    assert f"no image of {folder} was answered" in message
    shutil.copy(photo, folder / "a.png")
    output = run("bulk", folder, "--out", tmp_path / "other").output
    assert (
        "errors: 1 unsupported_image\nleft out, not images, judging by their names: 1 (a.txt)\n1 rows and 1 errors"
        in output
    )
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.add(photo, "a.png")
    shards = ("bulk", tmp_path / "{0,1}.tar", "--out", tmp_path / "shards")
    assert "1.tar is not a readable tar file: No such file or directory" in refused(*shards)
    output = run(*shards, "--skip-broken-shards").output
    assert "left out, damaged or missing: 1 (1.tar: No such file or directory)\n1 rows and 0 errors" in output


def test_attribute_prints_a_table(run, photo):
    result = run("attribute", photo)
    assert result.exit_code == 0
    assert all(label in result.output for label in LABELS)
    for row in (
        "prior",
        "attention 0",
        "attention 2",
        "CLT 0",
        "CLT 2",
        "bias",
        "error",
        "remainder",
        "logit",
        "Fidelity",
    ):
        assert row in result.output


def test_circuit_prints_features_and_where_the_influence_ends(run, refused, photo):
    result = run("circuit", photo, "--nodes", "10", "--contrast", LABELS[0], "--target", LABELS[1])
    assert result.exit_code == 0
    assert f"What made {LABELS[1]} rather than {LABELS[0]}" in result.output
    assert "10 were followed back" in result.output
    answer = json.loads(run("circuit", photo, "--json", "--nodes", "10").stdout)
    assert answer["followed"] == 10
    assert answer["nodes"]
    assert "not among the labels: 'unicorn'" in refused("circuit", photo, "--label", "unicorn")


def test_circuits_of_one_image_and_of_many_are_drawn(run, photo, tmp_path):
    page = tmp_path / "one.html"
    assert run("circuit", photo, "--nodes", "10", "--html", page, "--label", LABELS[1]).exit_code == 0
    assert f"<title>What made {LABELS[1]}: a circuit</title>" in page.read_text(encoding="utf-8")
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        shutil.copy(photo, folder / name)
    (folder / "c.png").write_bytes(b"no image")
    page = tmp_path / "many.html"
    asked = ("circuit", folder, "--label", LABELS[1], "--nodes", "10")
    result = run(*asked, "--html", page)
    assert result.exit_code == 0
    assert f"What made {LABELS[1]} in 2 images" in result.output
    assert "left out: 1 unsupported_image (c.png: " in result.output
    assert f"<title>What made {LABELS[1]} in 2 images: a circuit</title>" in page.read_text(encoding="utf-8")
    mean = json.loads(run(*asked, "--json").stdout)
    assert (mean["images"], mean["targets"]) == (2, {LABELS[1]: 2})
    assert [group["influence"] for group in mean["groups"]] == sorted(
        (group["influence"] for group in mean["groups"]), reverse=True
    )
    assert "has 3 images" in run(*asked, "--graph", tmp_path / "x.json").output
    assert not (tmp_path / "x.json").exists()


def test_attributes_table_shows_labels_as_they_are(run, photo):
    labels = "[bold]cat,[/foo],:smile:,[link=x]"
    result = run("attribute", photo, "--labels", labels, "--target", "[/foo]", "--contrast", "[bold]cat")
    assert result.exit_code == 0
    assert all(label in result.output for label in labels.split(","))
    assert "Why [/foo] rather than [bold]cat" in result.output


def test_attribute_draws_a_picture_that_needs_no_network(run, photo, tmp_path):
    result = run(
        "attribute",
        photo,
        "--labels",
        "cat,dog",
        "--contrast",
        "dog",
        "--target",
        "cat",
        "--svg",
        tmp_path / "answer.svg",
    )
    assert result.exit_code == 0
    picture = ElementTree.parse(tmp_path / "answer.svg")
    words = "".join(picture.getroot().itertext()).replace("\N{NO-BREAK SPACE}", " ")
    assert "rather than dog: the account of its logit" in words
    assert "remainder" in words
    assert "url(http" not in (tmp_path / "answer.svg").read_text()

    result = run("attribute", photo, "--svg", tmp_path / "nowhere" / "answer.svg")
    assert result.exit_code == 1
    assert "No such file" in result.stderr


def test_a_feature_is_named_with_the_number_that_its_card_has(run, photo, with_cards):
    answer = json.loads(run("attribute", photo, "--json").stdout)
    listed = [feature for layer in answer["explanations"][0]["layers"] for feature in layer["features"]]
    labelled, plain = ([f for f in listed if (f["label"] is None) == (not has)] for has in (True, False))
    assert labelled
    printed = " ".join(run("attribute", photo).output.split())
    assert all(f"{f['label']} #{f['index']} {f['contribution']:+.2f}" in printed for f in labelled)
    assert all(f" #{f['index']} {f['contribution']:+.2f}" in printed for f in plain)


def test_attributes_labels_templates_and_lens_are_the_requests(run, refused, photo):
    as_named = json.loads(run("attribute", photo, "--label-set", "default", "--json", "--top-k", "3").stdout)
    assert {prediction["label"] for prediction in as_named["predictions"]} == set(LABELS)
    assert as_named["lens"] is None
    assert "nothing" in refused("attribute", photo, "--label-set", "nothing")
    other = json.loads(run("attribute", photo, "--template", "{}", "--template", "no {}", "--lens", "--json").stdout)
    assert other["predictions"] != as_named["predictions"]
    last = other["lens"][-1]
    assert (last["layer"], last["label"]) == (2, other["predictions"][0]["label"])
    assert "templates" in refused("attribute", photo, "--template", "a photo")
    printed = run("attribute", photo, "--lens").output
    assert "The prediction after each layer" in printed


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_is_one_sentence_and_a_status(run, monkeypatch, number, status):
    def told(*_):
        with signals_raise():
            signal.raise_signal(number)

    monkeypatch.setattr("vitrine.training.recipes.catalogue.print_list", told)
    result = run("recipes")
    assert result.exit_code == status
    assert result.stderr.startswith(f"stopped by {number.name}: no unfinished files are left")
    assert result.stderr.count("\n") == 1


def test_the_version_is_the_packages(run):
    assert run("--version").output == f"vitrine {version('vitrine')}\n"


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("train --recipe photo-4", ["photo-48"]),
        ("attribute x.png --edit no", ["no-sky"]),
        ("attribute x.png --label-set d", ["default"]),
        ("attribute x.png --baseline m", ["mean"]),
        ("serve --bundle {models}/de", ["{models}/demo/"]),
    ],
)
def test_shells_complete_names(run, monkeypatch, typed, offered):
    monkeypatch.delenv("VITRINE_BUNDLE")  # the demo, then
    words = f"vitrine {typed.format(models=ROOT / 'models')}"
    for name, value in {"_VITRINE_COMPLETE": "complete_bash", "COMP_WORDS": words}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    result = CliRunner().invoke(app, prog_name="vitrine")
    assert result.output.split() == [name.format(models=ROOT / "models") for name in offered]


@pytest.mark.parametrize(
    "arguments", [[], ["--labels", "cat, dog", "--contrast", "dog", "--top-k", "1", "--features", "2"]]
)
def test_attributes_json_is_the_services_answer(run, photo, arguments):
    result = run("attribute", photo, "--json", *arguments)
    assert result.exit_code == 0
    answer = json.loads(result.stdout)
    assert AttributeResponse.model_validate(answer).model_dump(mode="json") == answer
    for explanation in answer["explanations"]:
        ledger = explanation["ledger"]
        rows = [ledger["prior"], *ledger["attention"], *ledger["clt"], ledger["bias"], ledger["error"]]
        assert sum(rows) + ledger["remainder"] == pytest.approx(explanation["logit"])


def test_attributes_options_are_the_requests_fields(run, photo):
    arguments = ["--labels", "cat,dog,car", "--target", "car", "--target", "cat", "--top-k", "2", "--features", "1"]
    answer = json.loads(run("attribute", photo, "--json", *arguments).stdout)
    assert len(answer["predictions"]) == 2
    assert [explanation["target"] for explanation in answer["explanations"]] == ["car", "cat"]
    assert max(len(layer["features"]) for layer in answer["explanations"][0]["layers"]) == 1


def test_attribute_takes_a_bundle(run, photo, bundle_path, monkeypatch):
    monkeypatch.setenv("VITRINE_BUNDLE", "/nowhere")
    assert run("attribute", photo, "--bundle", bundle_path).exit_code == 0


def test_attribute_refuses_what_is_no_image(refused, tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("no image")
    assert "not an image in a supported format" in refused("attribute", text)
    text.write_text("")
    assert "empty" in refused("attribute", text)


def test_attribute_refuses_a_damaged_image(refused, photo, tmp_path):
    cut = tmp_path / "cut.png"
    cut.write_bytes(photo.read_bytes()[:300])
    assert "damaged or incomplete" in refused("attribute", cut)


def test_attribute_refuses_what_is_not_among_the_labels(refused, photo):
    assert "'zebra'" in refused("attribute", photo, "--contrast", "zebra")
    assert "'zebra'" in refused("attribute", photo, "--labels", "cat,dog", "--target", "zebra")


@pytest.mark.parametrize("labels", ["", "cat,,dog", "cat,cat", "cat, "])
def test_attribute_refuses_bad_labels(refused, photo, labels):
    assert "labels" in refused("attribute", photo, "--labels", labels)


@pytest.mark.parametrize("command", ["attribute", "bulk", "replay", "evaluate", "export"])
def test_labels_are_given_in_one_way(run, refused, photo, tmp_path, command):
    """Before anything is opened."""
    (tmp_path / "names.txt").write_text("cat\ncat\n")
    arguments = {
        "attribute": [photo],
        "bulk": [photo, "--out", tmp_path / "out"],
        "replay": [photo],
        "evaluate": ["--checkpoint", tmp_path],
        "export": ["--checkpoint", tmp_path, "--out", tmp_path / "out"],
    }[command]
    both = run(command, *arguments, "--labels", "cat", "--labels-file", tmp_path / "names.txt")
    assert both.exit_code == 2
    assert "give --labels or --labels-file, not both" in both.output
    assert "'cat' is given twice" in refused(command, *arguments, "--labels-file", tmp_path / "names.txt")
    assert "--labels: a label has no letters" in refused(command, *arguments, "--labels", "cat,,dog")
    assert not (tmp_path / "out").exists()


def test_labels_of_a_file_may_have_commas(run, photo, tmp_path):
    (tmp_path / "names.txt").write_bytes("\ufefftench, a fish\r\n\r\ngrün\r\n".encode())
    result = run("attribute", photo, "--labels-file", tmp_path / "names.txt", "--json")
    answer = AttributeResponse.model_validate_json(result.stdout)
    assert {prediction.label for prediction in answer.predictions} == {"tench, a fish", "grün"}


def test_attribute_refuses_a_missing_image_bundle_or_number(run, refused, photo, tmp_path):
    assert run("attribute", tmp_path / "nowhere.png").exit_code == 2
    assert run("attribute", tmp_path).exit_code == 2
    assert run("attribute", photo, "--top-k", "0").exit_code == 2
    assert "nowhere" in refused("attribute", photo, "--bundle", tmp_path / "nowhere")


@pytest.mark.parametrize("command", ["attribute", "verify", "serve"])
def test_wrong_settings_are_named(refused, photo, bundle_path, monkeypatch, command):
    monkeypatch.setenv("VITRINE_BATCH_SIZE", "many")
    argument = {"attribute": [photo], "verify": [bundle_path], "serve": []}[command]
    assert "VITRINE_BATCH_SIZE='many'" in refused(command, *argument)


# serve


def test_serve_starts_nothing_with_a_damaged_bundle(refused, damaged):
    (damaged / "fold.npy").unlink()
    assert "fold.npy is missing" in refused("serve", "--bundle", damaged)


# train, export


@pytest.mark.usefixtures("remembered_conversions")
@pytest.mark.usefixtures("remembered_conversions")
def test_from_recipe_to_answer(run, recipe_path, data_root, photo, tmp_path):
    runs, bundle, recipe = tmp_path / "run", tmp_path / "bundle", tmp_path / "float32.toml"
    recipe.write_text(f"{recipe_path.read_text()}\n[bundle]\nvariants = []\n")
    trained = run("train", "--recipe", recipe, "--data-root", data_root, "--out", runs, "--max-steps", "3")
    assert (trained.exit_code, "checkpoint" in trained.output) == (0, True)
    trained = run("train", "--recipe", recipe, "--data-root", data_root, "--out", runs)
    assert (trained.exit_code, "checkpoint" in trained.output) == (0, True)
    exported = run("export", "--checkpoint", runs, "--data-root", data_root, "--out", bundle)
    assert exported.exit_code == 0
    is_bad_at_cls = open_bundle(bundle).manifest.metrics.r2_cls < 0.5
    assert ["warning: R² at [CLS]" in result.output for result in (trained, exported)] == [is_bad_at_cls] * 2
    assert run("verify", bundle).exit_code == 0
    assert open_bundle(bundle).manifest.metrics.r2 is not None
    assert open_bundle(bundle).baseline is not None, "source accounts, and the average picture, unless a recipe says no"
    answer = json.loads(run("attribute", photo, "--bundle", bundle, "--json").stdout)
    assert {prediction["label"] for prediction in answer["predictions"]} == set(LABELS)
    assert answer["model"]["digest"] == open_bundle(bundle).digest


def test_export_overwrites_nothing(refused, run, recipe_path, data_root, tmp_path):
    run("train", "--recipe", recipe_path, "--data-root", data_root, "--out", tmp_path / "run", "--max-steps", "1")
    (tmp_path / "bundle").mkdir()
    message = refused(
        "export", "--checkpoint", tmp_path / "run", "--data-root", data_root, "--out", tmp_path / "bundle"
    )
    assert "exists" in message


@pytest.mark.parametrize("content", [None, "", "name = ", "name = 1", "[clip]\nname = 'x'"])
def test_train_names_what_is_wrong_with_a_recipe(refused, data_root, tmp_path, content):
    recipe = tmp_path / "recipe.toml"
    if content is not None:
        recipe.write_text(content)
    message = refused("train", "--recipe", recipe, "--data-root", data_root, "--out", tmp_path / "run")
    assert "recipe.toml" in message


def test_a_recipe_is_checked_before_torch_is_loaded(tmp_path):
    (tmp_path / "bad.toml").write_text("name = 1")
    code = (
        "import sys; from vitrine.commands import app\n"
        "try: app(['train', '--recipe', 'bad.toml', '--out', 'run', '--seed', '1'])\n"
        "finally: print([name for name in ('torch', 'open_clip', 'lightning_fabric') if name in sys.modules])"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert finished.returncode == 1
    assert finished.stdout == "[]\n"
    assert "bad.toml" in finished.stderr


def test_train_and_export_say_what_is_missing(refused, recipe_path, tmp_path):
    out = tmp_path / "run"
    assert str(tmp_path) in refused("train", "--recipe", recipe_path, "--data-root", tmp_path, "--out", out)
    assert "nowhere" in refused("export", "--checkpoint", tmp_path / "nowhere", "--out", out)


def test_output_has_no_control_characters_where_there_is_no_terminal(run, photo):
    assert "\x1b" not in run("attribute", photo).output


# Exports of an account, and cards


def test_attribute_draws_a_page(run, photo, with_cards, tmp_path):
    which = ["--target", LABELS[0], "--contrast", LABELS[1]]
    result = run("attribute", photo, *which, "--html", tmp_path / "out.html")
    assert result.exit_code == 0
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    data = json.loads(page.partition('id="data">')[2].partition("</script>")[0])
    assert data["answer"]["explanations"][0]["contrast"] == LABELS[1]
    assert data["answer"]["explanations"][0]["heatmap"]
    explanation = data["answer"]["explanations"][0]
    assert (
        explanation["sources"]["layers"][0]["silent"] is not None
    )  # relative to the average image, which the bundle has
    ledger = {(layer["layer"], feature["index"]) for layer in explanation["layers"] for feature in layer["features"]}
    sources = {(feature["layer"], feature["index"]) for feature in explanation["sources"]["features"]}
    assert set(data["cards"]) == {f"clt/{layer}/{index}" for layer, index in ledger | sources}
    assert 3 < len(ledger) <= 9
    assert sources - ledger
    assert data["image"].startswith("data:image/png;base64,")


def test_attribute_writes_graphs(run, photo, with_cards, tmp_path):
    targets = ["--target", LABELS[0], "--target", LABELS[2]]
    result = run("attribute", photo, *targets, "--top-k", 1, "--features", 1, "--graph", tmp_path / "out.json")
    assert result.exit_code == 0
    for name, label in (("out.json", LABELS[0]), ("out-2.json", LABELS[2])):
        graph = json.loads((tmp_path / name).read_text(encoding="utf-8"))
        kinds = [node["feature_type"] for node in graph["nodes"]]
        assert kinds.count("embedding") == 17
        assert kinds.count("cross layer transcoder") > 9, "all active features, whatever is printed"
        assert label in graph["metadata"]["prompt"]
    assert list((tmp_path / "out-features").glob("*.json"))


def test_exports_without_cards(run, photo, tmp_path):
    assert run("attribute", photo, "--html", tmp_path / "x.html", "--graph", tmp_path / "x.json").exit_code == 0
    assert '"cards": {}' in (tmp_path / "x.html").read_text(encoding="utf-8")
    assert not (tmp_path / "x-features").exists()


def test_a_graph_goes_to_a_name_that_viewers_read(refused, photo, tmp_path):
    assert "name the file NAME.json" in refused("attribute", photo, "--graph", tmp_path / "out.txt")


def test_verify_counts_the_labels_of_cards(run, refused, with_cards, tmp_path):
    result = run("verify", with_cards.path)
    assert result.exit_code == 0
    assert "features have a label" in result.output
    quality = with_cards.manifest.cards.quality.model_copy(update={"labelled": 1})
    summary = with_cards.manifest.cards.model_copy(update={"quality": quality})
    other = Path(shutil.copytree(with_cards.path, tmp_path / "other"))
    seal(other, with_cards.manifest.model_copy(update={"cards": summary}))
    assert "the manifest says 1" in refused("verify", other)
