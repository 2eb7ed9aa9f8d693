"""`vitrine.load` and what can be asked of it: as the command answers, from any thread, and closed without a trace."""

import asyncio
import gc
import json
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest
from PIL import Image
from pydantic import BaseModel

import vitrine
from common import ROOT
from vitrine.service.errors import ServiceError
from vitrine.service.library.images import NoImageError
from vitrine.service.library.options import CircuitOptions, ClassifyOptions, ExplainOptions, InterveneOptions, names
from vitrine.service.library.runner import ClosedError
from vitrine.service.operations.settings import SettingsError
from vitrine.service.schemas.attribute import AttributeRequest
from vitrine.service.schemas.circuit import CircuitRequest
from vitrine.service.schemas.classify import ClassifyRequest
from vitrine.service.schemas.intervene import InterveneRequest

LABELS = ["cat", "dog", "frog"]


def said(answer):
    """An answer without what differs from one to the next."""
    if isinstance(answer, BaseModel):
        answer = json.loads(answer.model_dump_json())
    fields = answer if isinstance(answer, dict) else json.loads(answer.to_json())
    return {name: value for name, value in fields.items() if name not in ("request_id", "timings_ms", "model")}


@pytest.fixture(scope="module")
def photo(picture, tmp_path_factory):
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    path.write_bytes(picture())
    return path


def test_every_kind_of_image_is_answered_as_the_command_does(loaded, photo, carded, run_command):
    options = ["--labels", ",".join(LABELS), "--features", "4", "--contrast", "dog", "--bundle", carded.path]
    expected = said(json.loads(run_command("attribute", photo, *options, "--json")))
    with Image.open(photo) as opened:
        opened.load()
    array = np.array(opened)
    for image in (photo, str(photo), photo.read_bytes(), bytearray(photo.read_bytes()), opened, array, array[:, ::1]):
        assert said(loaded.explain(image, labels=LABELS, features=4, contrast="dog")) == expected, type(image)


@pytest.fixture(scope="module")
def run_command():
    from typer.testing import CliRunner

    from vitrine.commands import app

    return lambda *words: CliRunner().invoke(app, [*map(str, words)], catch_exceptions=False).stdout


def test_a_transparent_picture_is_white_below_and_says_so(loaded, draw, encode):
    clear = draw("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    of_picture, of_file = loaded.explain(clear), loaded.explain(encode(clear))
    assert said(of_picture) == said(of_file)
    assert [notice.code for notice in of_picture.warnings] == ["image_transparent"]


def test_many_are_answered_as_one_by_one(loaded, picture):
    files = [picture(seed=seed) for seed in range(11)]
    many = loaded.explain(iter(files), labels=LABELS, heatmap=True)
    assert [one.logit for one in many] == pytest.approx(
        [loaded.explain(file, labels=LABELS).logit for file in files], abs=1e-4
    )
    assert len({one.logit for one in many}) == 11
    assert all(one.heatmap for one in many)
    classified = loaded.classify(files, labels=LABELS)
    assert [one.predictions[0].label for one in classified] == [one.label for one in many]
    assert loaded.explain([]) == []


def test_embeddings_give_the_cosines(loaded, picture):
    files = [picture(seed=seed) for seed in range(3)]
    images, texts = loaded.embed(files), loaded.embed(texts=["cat", "dog"])
    assert images.shape == (3, 24)
    assert np.allclose(np.linalg.norm(np.concatenate([images, texts]), axis=1), 1, atol=1e-5)
    assert np.allclose(loaded.embed(files[1]), images[1], atol=1e-5)
    (found,) = loaded.classify(files[:1], labels=["cat", "dog"], templates=["{}"])
    cosines = {one.label: one.cosine for one in found.predictions}
    assert [cosines["cat"], cosines["dog"]] == pytest.approx(list(texts @ images[0]), abs=1e-5)


def test_circuits_are_the_commands(loaded, photo, carded, run_command):
    options = ["--labels", ",".join(LABELS), "--label", "cat", "--contrast", "dog", "--nodes", "20"]
    expected = said(json.loads(run_command("circuit", photo, *options, "--bundle", carded.path, "--json")))
    asked = {"labels": LABELS, "target": "cat", "contrast": "dog", "nodes": 20}
    assert said(loaded.circuit(photo, **asked)) == expected
    several = loaded.circuit([photo, photo], **asked)
    assert [said(one) for one in several] == [said(loaded.circuit(photo, **asked))] * 2


def test_interventions_and_cards(loaded, picture):
    account = loaded.explain(picture(), labels=LABELS, targets=["cat"])
    feature = max((f.contribution, layer.layer, f.index) for layer in account.layers for f in layer.features)
    edit = f"ablate {feature[1]}/{feature[2]}"
    (changed,) = loaded.intervene(picture(), labels=LABELS, targets=["cat"], edits=[edit]).results
    assert changed.difference.explanations[0].logit != 0
    edits = [changed.edits[0].model_dump(exclude_unset=True)]
    (again,) = loaded.intervene(picture(), labels=LABELS, targets=["cat"], variants=[edits]).results
    assert again.after.explanations == changed.after.explanations
    assert loaded.card(feature[1], feature[2]).index == feature[2]


def test_within_a_running_event_loop_and_from_threads(loaded, picture):
    async def notebook():
        return loaded.explain(picture()).label

    expected, found = asyncio.run(notebook()), []
    threads = [threading.Thread(target=lambda: found.append(loaded.explain([picture()] * 3))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one.label for many in found for one in many] == [expected] * 12


def test_no_more_images_are_in_hand_than_there_are_places(carded, picture):
    with vitrine.load(carded.path, decode_threads=1, queue_size=1, batch_size=1) as small:
        assert len(small.classify([picture()] * 9)) == 9  # else the third would be refused, as a server's would


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (np.zeros((4, 4, 3)), "has no known range of values"),
        (np.zeros((3, 5, 7), np.uint8), "colours first"),
        (np.zeros((4, 4), np.uint8), "PIL.Image.fromarray"),
        (np.zeros((4, 4, 4), np.uint8), "transparent"),
        (np.zeros((2, 4, 4, 3), np.uint8), "list(array)"),
        (np.zeros((0, 4, 3), np.uint8), "is not an image"),
        (7, "int is not an image"),
        (None, "NoneType is not an image"),
        ("https://example.org/cat.jpg", "URLs are not fetched"),
        ([7], "int is not an image"),
    ],
)
def test_what_is_no_image_is_refused_without_a_guess(loaded, image, sentence):
    with pytest.raises(NoImageError, match=sentence.replace("(", r"\(").replace(")", r"\)")):
        loaded.explain(image)


def test_tensors_are_refused(loaded):
    torch = pytest.importorskip("torch")
    for tensor in (torch.zeros(3, 4, 4), [torch.zeros(3, 4, 4)]):
        with pytest.raises(NoImageError, match="scaled or normalised"):
            loaded.explain(tensor)


def test_a_column_of_a_table_is_a_list(loaded, photo):
    pandas = pytest.importorskip("pandas")
    assert len(loaded.classify(pandas.DataFrame({"path": [str(photo)] * 2}).path)) == 2


def test_refusals_are_sentences(loaded, picture, tmp_path):
    for options, sentence in [
        ({"label": LABELS}, "did you mean `labels`?"),
        ({"explain": {"heatmap": True}}, "`explain` is not an option"),
        ({"labels": LABELS, "contrast": "unicorn"}, "not among the labels: 'unicorn'"),
        ({"features": -1}, "^features: "),
        (
            {"matrix": True, "edit": "none", "lens": True, "scoring": "independent", "threshold": 0.2},
            "`lens` shows softmax",
        ),
    ]:
        with pytest.raises(ServiceError) as refused:
            loaded.explain(picture(), **options)
        assert sentence.lstrip("^") in str(refused.value)
        assert str(refused.value).startswith("features: ") or not sentence.startswith("^")
    with pytest.raises(ServiceError, match=r"image 1: .*not an image in a supported format"):
        loaded.explain([picture(), b"text", picture()])
    with pytest.raises(FileNotFoundError) as missing:
        loaded.explain([tmp_path / "none.png"])
    assert "index 0 of the list" in missing.value.__notes__[0]
    with pytest.raises(NoImageError, match="it is a folder"):
        loaded.explain(tmp_path)
    for wrong in ({}, {"images": picture(), "texts": ["cat"]}, {"texts": "cat"}):
        with pytest.raises(ServiceError):
            loaded.embed(**wrong)
    with pytest.raises(vitrine.VitrineError, match="neither a bundle"):
        vitrine.load(tmp_path)
    with pytest.raises(SettingsError, match="did you mean VITRINE_PRECISION"):
        vitrine.load(precison="int8")


@pytest.mark.parametrize(
    ("options", "request_shape"),
    [
        (ExplainOptions, AttributeRequest),
        (ClassifyOptions, ClassifyRequest),
        (InterveneOptions, InterveneRequest),
        (CircuitOptions, CircuitRequest),
    ],
)
def test_options_are_the_fields_of_the_requests(options, request_shape):
    outer, inner = names(request_shape)
    assert sorted(options.__annotations__) == sorted([*outer, *inner])


def children():
    return {child.pid for child in psutil.Process().children(recursive=True)}


def test_two_side_by_side_and_closed_without_a_trace(carded, plain_bundle, picture):
    threads, processes = set(threading.enumerate()), children()
    first, second = (vitrine.load(bundle.path, decode_threads=1) for bundle in (carded, plain_bundle))
    of_first, of_second = first.explain(picture()), second.explain(picture())
    assert children() > processes
    assert of_first.fidelity
    assert of_second.fidelity is None
    assert of_second.ledger.mlp
    first.close()
    with pytest.raises(ClosedError, match="load it again"):
        first.explain(picture())
    assert second.explain(picture()).logit == pytest.approx(of_second.logit)
    first.close()
    assert "<iframe" in of_first._repr_html_()  # an account outlives its bundle
    second.close()
    assert set(threading.enumerate()) <= threads
    assert children() <= processes


def test_what_nothing_refers_to_ends(carded, picture):
    threads, processes = set(threading.enumerate()), children()
    account = vitrine.load(carded.path, decode_threads=1).explain(picture())
    assert "<iframe" in account._repr_html_()  # which needs the bundle still
    del account
    gc.collect()
    end = time.monotonic() + 30
    while (set(threading.enumerate()) - threads or children() - processes) and time.monotonic() < end:
        time.sleep(0.05)
    assert set(threading.enumerate()) <= threads
    assert children() <= processes


def test_a_bundle_that_cannot_be_loaded_leaves_nothing_behind(carded):
    threads = set(threading.enumerate())
    with pytest.raises(vitrine.VitrineError):
        vitrine.load(carded.path, edit="none-such")
    assert set(threading.enumerate()) <= threads


def test_an_interrupted_question_is_given_up_and_the_next_answered(carded, gate, picture):
    with vitrine.load(carded.path, decode_threads=1) as explainer:
        gate.clear()
        main = threading.main_thread().ident
        threading.Timer(0.3, lambda: signal.pthread_kill(main, signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            explainer.explain(picture())
        gate.set()
        assert explainer.explain(picture()).label


LIGHT = """
import sys, vitrine
assert not {"numpy", "pydantic", "onnxruntime"} & set(sys.modules), "import vitrine is no longer cheap"
v = vitrine.load()
a = v.explain(sys.argv[1])
print(a.label)
print(len(a._repr_html_()) > 1000 and str(a).splitlines()[0])
for name in ("pandas", "matplotlib"):
    sys.modules[name] = sys.modules[name + ".pyplot"] = None
for ask in (a.to_frame, a.plot):
    try:
        ask()
    except vitrine.VitrineError as error:
        print(error)
"""


def test_a_program_that_closes_nothing_needs_no_extra_package_and_ends_quietly(run_python, photo):
    done = run_python("-W", "error::ResourceWarning", "-c", LIGHT, photo)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    *_, head, tables, drawing = done.stdout.splitlines()
    assert head.split() == ["label", "probability", "logit"]
    assert tables == "to_frame() requires pandas: pip install pandas"
    assert drawing == "plot() requires matplotlib: pip install matplotlib"


TYPED = """
import numpy as np
import vitrine
v = vitrine.load("bundles/b32", precision="int8")
reveal_type(v)
reveal_type(v.explain("photo.jpg", labels=["cat"], heatmap=True))
reveal_type(v.explain(["a.jpg", b"", np.zeros((2, 2, 3), np.uint8)]))
reveal_type(v.explain("photo.jpg").ledger.prior)
v.explain("photo.jpg", heatmpa=True)
v.explain("photo.jpg", top_k="many")
"""


def test_types_are_seen_by_mypy(tmp_path):
    (tmp_path / "example.py").write_text(TYPED)
    # the cache of the checkout's own run, which comes before the tests
    options = ["--cache-dir", ROOT / ".mypy_cache", "--config-file", ROOT / "pyproject.toml", "--no-error-summary"]
    command = [sys.executable, "-m", "mypy", *options, tmp_path / "example.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = [line.partition("example.py:")[2] for line in done.stdout.splitlines()]
    revealed = [line.split('"')[1].replace("builtins.", "") for line in said if "Revealed type" in line]
    library = "vitrine.service.library"
    account = f"{library}.account.Account"
    assert revealed == [f"{library}.explainer.Explainer", account, f"list[{account}]", "float"], done.stdout
    assert {line.split(":")[0] for line in said if " error: " in line} == {"9", "10"}, done.stdout
    assert 'did you mean "heatmap"?' in done.stdout


def test_the_notebook_runs():
    pytest.importorskip("matplotlib").use("Agg")
    notebook = json.loads((ROOT / "service/examples/vitrine.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in notebook["cells"])
    namespace = {}
    for cell in cells:
        exec(compile(cell, "vitrine.ipynb", "exec"), namespace)
    assert namespace["frame"].logits.sum() == pytest.approx(namespace["a"].logit, abs=1e-5)
    assert namespace["v"].is_closed
