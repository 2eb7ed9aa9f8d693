"""What is installed: one name to import, whatever is installed from, with all the files that the package reads."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import pytest

from common import ROOT

BUILD = "import sys; from hatchling import build; print(getattr(build, sys.argv[1])(sys.argv[2]))"
NEEDED = {
    "vitrine/__main__.py",
    "vitrine/models/demo/manifest.json",
    "vitrine/py.typed",
    "vitrine/service/examples/vitrine.ipynb",
    "vitrine/service/web/index.html",
    "vitrine/training/recipes/demo.toml",
    "vitrine/training/recipes/clip/demo.toml",
    "vitrine/training/report/report.html.j2",
    "vitrine/training/vocabularies/demo.txt",
}


def build(kind, source, out):
    done = subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(out)], cwd=source, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return out / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build("build_wheel", ROOT, tmp_path_factory.mktemp("wheel"))


def files_in(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("RECORD")}


def test_wheel_has_one_top_level_name(wheel):
    names = files_in(wheel)
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith((".dist-info", ".data"))} == {"vitrine"}
    assert names >= NEEDED
    tracked = subprocess.run(
        ["git", "ls-files", "models", "service", "training"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert {f"vitrine/{name}" for name in tracked.stdout.split()} <= names  # nothing is left out, nothing is twice
    assert not [name for name in names if "__pycache__" in name]


def test_wheel_from_the_sdist_is_the_same(wheel, tmp_path):
    sdist = build("build_sdist", ROOT, tmp_path)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert files_in(build("build_wheel", source, tmp_path / "again")) == files_in(wheel)


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The Python of a new environment with the wheel in it; what the wheel needs is this environment's."""
    place = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place], check=True)
    python = place / "bin" / "python"
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.run([python, "-c", where], capture_output=True, text=True, check=True).stdout.strip()
    with open(f"{packages}/ours.pth", "w") as file:  # its packages, but not what is editable there
        file.write(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run([str(word) for word in pip], check=True, capture_output=True)
    return python


def ask(python, code, cwd):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([python, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_an_installed_vitrine_brings_one_name(installed, tmp_path):
    code = "import importlib.metadata as m; print({f.parts[0] for f in m.files('vitrine') if f.suffix == '.py'})"
    assert ask(installed, code, tmp_path) == "{'vitrine'}"


def test_it_is_imported_beside_a_folder_models(installed, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("raise RuntimeError\n")
    found = ask(installed, "import vitrine.models.clip.tower as tower; print(tower.__file__)", tmp_path)
    assert found.startswith(str(installed.parents[1]))


def test_the_installed_command_runs_in_a_project_with_a_module_of_its_name(installed, tmp_path):
    (tmp_path / "vitrine.py").write_text("raise RuntimeError\n")
    done = subprocess.run(
        [installed.with_name("vitrine"), "doctor"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "the graphs run" in done.stdout
    assert str(installed.parents[1]) in done.stdout.replace("\n", "").replace(" ", "")  # its own embedded bundle


def test_an_editable_install_brings_no_other_folder_of_the_checkout(tmp_path):
    code = "import importlib.util as u; print([n for n in ('models', 'service', 'training') if u.find_spec(n)])"
    assert ask(sys.executable, code, tmp_path) == "[]"
