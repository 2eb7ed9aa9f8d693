"""Bundles as repositories of a hub, in a folder and uploaded."""

import io
import shutil
import subprocess

import pytest
import yaml
from rich.console import Console

from vitrine.models.bundle.bundle import open_bundle
from vitrine.models.bundle.files import BundleError
from vitrine.models.bundle.sealing import seal
from vitrine.models.hub import push as pushing
from vitrine.models.hub.address import Address, HubError
from vitrine.models.hub.pull import pull
from vitrine.models.hub.push import upload, write_folder

# huggingface_hub's own way to upload to LFS
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
TINY = Address("org/tiny")


def header(text):
    _, head, rest = text.split("---\n", 2)
    return yaml.safe_load(head), rest


@pytest.fixture
def relicensed(bundle, bundle_path, tmp_path):
    """relicensed(licence, clip) -> a copy of the bundle with another licence and another name of its CLIP."""

    def copy(licence, clip="tiny"):
        shutil.copytree(bundle_path, tmp_path / "copy")
        identity = bundle.manifest.clip.model_copy(update={"name": clip})
        return seal(tmp_path / "copy", bundle.manifest.model_copy(update={"licence": licence, "clip": identity}))

    return copy


def test_a_folder_has_the_bundle_a_card_and_attributes(tmp_path, bundle, bundle_path):
    write_folder(bundle, tmp_path / "repository")
    files = {p.relative_to(tmp_path / "repository").as_posix(): p for p in (tmp_path / "repository").rglob("*")}
    own = {name: path for name, path in files.items() if path.is_file() and name not in ("README.md", ".gitattributes")}
    assert set(own) == {"manifest.json", *bundle.manifest.files}
    assert all(path.read_bytes() == (bundle_path / name).read_bytes() for name, path in own.items())
    data, text = header(files["README.md"].read_text())
    assert data["library_name"] == "vitrine"
    assert data["pipeline_tag"] == "zero-shot-image-classification"
    assert {"clip", "interpretability"} <= set(data["tags"])
    assert text.strip().startswith((bundle_path / "MODEL_CARD.md").read_text().strip())
    assert f"--digest {bundle.digest}" in text
    assert open_bundle(tmp_path / "repository").digest == bundle.digest  # the folder is a bundle, too
    with pytest.raises(HubError, match="exists"):
        write_folder(bundle, tmp_path / "repository")


@pytest.mark.parametrize(
    ("licence", "expected"),
    [("Apache-2.0", {"license": "apache-2.0"}), ("CC0-1.0", {"license": "cc0-1.0"}),
     ("My own: ask me!", {"license": "other", "license_name": "my-own-ask-me"})],
)  # fmt: skip
def test_the_header_has_the_licence_as_the_hub_writes_it(relicensed, tmp_path, licence, expected):
    write_folder(relicensed(licence), tmp_path / "repository")
    data, _ = header((tmp_path / "repository" / "README.md").read_text())
    assert {name: value for name, value in data.items() if name.startswith("license")} == expected
    assert "base_model" not in data


def test_the_header_names_the_clip_of_a_hub(relicensed, tmp_path):
    write_folder(relicensed("mit", "hf-hub:timm/a-clip"), tmp_path / "repository")
    assert header((tmp_path / "repository" / "README.md").read_text())[0]["base_model"] == "timm/a-clip"


def test_git_changes_no_bytes_and_keeps_tables_in_lfs(tmp_path, bundle, monkeypatch):
    monkeypatch.setattr(pushing, "MOST_IN_GIT", bundle.manifest.files["tokenizer.json"].bytes - 1)
    folder = tmp_path / "repository"
    write_folder(bundle, folder)
    subprocess.run(["git", "init", "-q", folder], check=True)
    names = ["manifest.json", *bundle.manifest.files]
    command = ["git", "-C", folder, "check-attr", "filter", "text", "--", *names]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {tuple(line.split(": ")[:2]): line.split(": ")[2] for line in output.splitlines()}
    assert {found[name, "text"] for name in names} == {"unset"}
    in_lfs = {name for name in names if found[name, "filter"] == "lfs"}
    assert in_lfs >= {"tokenizer.json", "vision.onnx", "vision.onnx.data", "fold.npy"}
    assert not in_lfs & {"manifest.json", "MODEL_CARD.md"}


def test_an_upload_can_be_pulled(hub, tmp_path, bundle):
    commit = upload(bundle, TINY)
    assert commit == hub.branches["org/tiny"]["main"]
    assert hub.made["org/tiny"]["visibility"] == "private"
    assert len(hub.commits["org/tiny"]) == 2  # the empty one, and all files at once
    pulled = pull(TINY, tmp_path / "pulled", Console(file=io.StringIO()), bundle.digest)
    assert pulled.manifest == bundle.manifest
    assert header(hub.files("org/tiny")["README.md"].decode())[1].count("hf-hub:org/tiny ") == 1
    assert upload(bundle, TINY)  # a repository that is there
    assert hub.lfs


def test_an_upload_that_is_refused_is_one_sentence(hub, bundle):
    hub.answers["lfs"] = (403, "")
    with pytest.raises(HubError, match=r"^hf-hub:org/tiny: the upload failed: .*403"):
        upload(bundle, TINY)
    assert hub.files("org/tiny") == {}
    with pytest.raises(HubError, match=r"hf-hub:org/tiny@v9: the repository has no such branch"):
        upload(bundle, Address("org/tiny", "v9"))


def test_a_bundle_that_changed_since_it_was_verified_is_not_pushed(hub, tmp_path, bundle_path):

    opened = open_bundle(shutil.copytree(bundle_path, tmp_path / "copy"))
    (opened.path / "fold.npy").write_bytes(b"x")
    with pytest.raises(BundleError, match="has changed since it was verified"):
        upload(opened, TINY)
    with pytest.raises(BundleError, match="has changed since it was verified"):
        write_folder(opened, tmp_path / "repository")
    assert {path.name for path in tmp_path.iterdir()} == {"copy"}
    assert not hub.files("org/tiny")


@pytest.mark.parametrize("name", ["README.md", ".gitattributes"])
def test_a_bundle_with_a_file_of_the_hubs_is_refused(tmp_path, bundle, bundle_path, name):

    shutil.copytree(bundle_path, tmp_path / "copy")
    (tmp_path / "copy" / name).write_text("mine")
    with pytest.raises(HubError, match=f"has its own file {name}"):
        write_folder(seal(tmp_path / "copy", bundle.manifest), tmp_path / "repository")
