"""Every `vitrine` line of the documents is run as it is shown, in a folder that has what it names. Those that need a
network, or go on until they are stopped, are listed here, with the tests that run them."""

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pyarrow.parquet
import pytest
from typer.testing import CliRunner

from common import RECIPE, ROOT
from documents import MORE, fences
from vitrine.commands import app

BIRDS = 64
DEMO = ROOT / "models" / "demo"
PROGRAM = re.compile(r"(?:\S+=\S+ )*(?:\.venv(?:-dev)?/bin/)?vitrine ")
FENCES = [fence for fence in fences("sh", "") if any(PROGRAM.match(line) for line in fence.commands)]
ELSEWHERE = {
    "vitrine serve": "until it is stopped: tests/service",
    "--clip ViT-B-32": "weights from the hub: tests/commands/test_export_clip.py",
    "hf-hub:": "the hub: tests/commands/test_hub_commands.py",
    "runs/b32": "a CLIP from the hub and CIFAR-100: README.md has the same commands",
    "--ray": "eight processes: tests/service/offline/test_bulk.py",
    "vitrine planted": "fine-tunes a CLIP: tests/training/planted",
    MORE: "some of it is left out",
}


def lines(fence):
    """Its lines of `vitrine`, and of what writes files for them."""
    parts = [part.strip() for line in fence.commands for part in re.split(r"; (?=vitrine)", line)]
    return [part for part in parts if PROGRAM.match(part) or re.match("cp |printf ", part)]


def is_run(line):
    return not any(part in line for part in ELSEWHERE)


@pytest.fixture
def folder(data_root, write_clip, sae_checkpoint, draw, encode, tmp_path):
    """What the documents name: photos, a list and a table of them, what a recipe names, a run and bundles."""
    write_clip()
    folder = tmp_path
    images = {
        f"photos/{label}/{number}.jpg": encode(draw(seed=number), "JPEG")
        for label in ("cat", "dog")
        for number in range(3)
    }
    waterbirds = {f"waterbirds/{number}.jpg": encode(draw(seed=number), "JPEG") for number in range(BIRDS)}
    for name, content in {
        **images,
        **waterbirds,
        "photo.jpg": images["photos/cat/0.jpg"],
        "build/cat.png": encode(draw()),
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    texts = {
        "list.txt": "photos/cat/0.jpg\nphotos/dog/1.jpg\n",
        "names.txt": "cat\ndog\nship, at sea\n",
        "key": "0123456789abcdef" * 2,
        "mat.json": '[{"op": "ablate", "layer": 2, "index": 1}]',
        "label-sets/sketched.json": '{"labels": ["cat", "dog"]}',
        "waterbirds/metadata.csv": "img_filename,y,place\n"
        + "".join(f"{n}.jpg,{n % 2},{n // 2 % 2}\n" for n in range(BIRDS)),
    }
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    table = pyarrow.table({"image": list(images.values())})
    pyarrow.parquet.write_table(table, folder / "photos.parquet")
    for name in ("runs", "bundles", "edits"):
        (folder / name).mkdir()
    links = {
        "data": data_root,
        "training": ROOT / "training",
        "bundles/b32": DEMO,
        "runs/mine-sae": sae_checkpoint.parent,
    }
    for name, target in links.items():
        (folder / name).symlink_to(target)
    return folder


@pytest.fixture
def run_line(folder, checkpoint, monkeypatch):
    """run_line(line): as a shell in that folder would."""
    monkeypatch.chdir(folder)
    settings = {
        "VITRINE_DATA": "data",
        "VITRINE_LABEL_SETS": "label-sets",
        "VITRINE_PRECISION": "fp32",
        "VITRINE_MAX_CIRCUIT_NODES": "64",  # so that a circuit takes less time
        "COLUMNS": "120",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)

    def run(line):
        program = PROGRAM.match(line)
        if program is None:
            subprocess.run(["bash", "-c", line], check=True)
            if line.startswith("cp training/recipes"):  # "then its lines on the CLIP, the photos and the labels"
                Path(line.split()[-1]).write_text(RECIPE)
            return
        if "--out answers" in line:  # lines that are alternatives
            shutil.rmtree("answers", ignore_errors=True)
        words = shlex.split(line[program.end() :].replace("NAME", "sketched"), comments=True)
        output = words[-1] if ">" in words else None
        words = words[: words.index(">")] if output else words
        with pytest.MonkeyPatch.context() as patch:
            for variable in re.findall(r"(\w+)=(\S+)(?= .*vitrine)", program[0]):
                patch.setenv(*variable)
            result = CliRunner().invoke(app, words)
        is_none = "vitrine debias" in line and "no edit was better" in result.output  # the photos are drawn ones
        assert result.exit_code == 0 or is_none, f"{line}\n{result.output}{result.exception!r}"
        if output:
            Path(output).write_text(result.stdout)
        if "vitrine train" in line and "runs/mine" in line:  # a bundle of this one is exported once for all tests
            shutil.rmtree("runs/mine")
            shutil.copytree(checkpoint.parent, "runs/mine")
            (meta,) = Path("runs/mine").glob("*/checkpoint.json")
            kept = json.loads(meta.read_text())
            kept["recipe"]["bundle"]["replacement"] = True  # as in the recipe that was copied
            meta.write_text(json.dumps(kept))

    return run


@pytest.mark.usefixtures("remembered_conversions")
@pytest.mark.parametrize("fence", FENCES, ids=lambda fence: fence.name)
def test_commands_run_as_shown(run_line, fence):
    if "--out bundles/mine " not in fence.text:
        Path("bundles/mine").symlink_to(DEMO)
    for line in filter(is_run, lines(fence)):
        run_line(line)


def test_each_reason_has_its_line():
    shown = [line for fence in FENCES for line in lines(fence)]
    assert all(any(part in line for line in shown) for part in ELSEWHERE)
