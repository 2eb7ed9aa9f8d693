"""A bundle as a repository of the hub: its files as they are, a model card that the hub reads, and git's attributes.

README.md        the hub's header (licence, library, tags), then MODEL_CARD.md, then how to pull it
.gitattributes   no file's bytes are changed, or the manifest's digests would no longer hold; tables go to LFS
"""

from __future__ import annotations

import re
import shutil
import tempfile
import warnings
from pathlib import Path, PurePosixPath

from huggingface_hub import CommitOperationAdd, HfApi, ModelCardData
from huggingface_hub.utils import disable_progress_bars

from vitrine.models.bundle.bundle import Bundle
from vitrine.models.bundle.layout import MANIFEST
from vitrine.models.files.names import check_name
from vitrine.models.files.problems import naming
from vitrine.models.files.writing import move_folder, prepare_folder
from vitrine.models.hub.address import PREFIX, Address, HubError, hub_errors

CARD, ATTRIBUTES = "README.md", ".gitattributes"
LARGE = ("onnx", "data", "npy", "npz", "parquet")  # ends of the names of what goes to LFS
MOST_IN_GIT = 10 * 2**20  # bytes of a file without LFS, for the hub
LIBRARY = "vitrine"
TAGS = ("clip", "interpretability", "transcoder", "sparse-features", "onnx", "vitrine")
# Licences of bundles that the hub knows by these names, too; every other one is `other`, with its name.
# https://huggingface.co/docs/hub/repositories-licenses
LICENCES = {
    "agpl-3.0", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-sa-4.0",
    "cc-by-sa-4.0", "cc0-1.0", "gpl-3.0", "lgpl-3.0", "mit", "mpl-2.0", "openrail", "unlicense",
}  # fmt: skip


def repository_files(bundle: Bundle, address: Address | None = None) -> dict[str, Path | bytes]:
    """Every file of the repository: where it lies in the bundle, or its bytes.

    Raises `HubError` if the bundle has a file of its own where the hub wants another.
    """
    if taken := sorted({CARD, ATTRIBUTES} & bundle.manifest.files.keys()):
        raise HubError(
            f"{bundle.path} has its own file {taken[0]}, but on the hub this name is used by the model card or git; "
            f"rename the file"
        )
    return {
        ATTRIBUTES: _attributes(bundle).encode(),
        CARD: _card(bundle, address).encode(),
        MANIFEST: bundle.path / MANIFEST,
        **{name: bundle.path / name for name in bundle.manifest.files},
    }


def write_folder(bundle: Bundle, out: Path, address: Address | None = None) -> None:
    """Write the repository's files to the folder `out`, which appears when they are whole. Raises `HubError`,
    `FileError`."""
    check_name(out)
    if out.exists() or out.is_symlink():
        raise HubError(f"{out} already exists; choose another place")
    files = repository_files(bundle, address)
    prepare_folder(out.parent)
    with naming(out), tempfile.TemporaryDirectory(dir=out.parent, prefix=".bundle-") as scratch:
        partial = Path(scratch) / "repository"
        for name, content in files.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                (partial / name).write_bytes(content)
            else:
                shutil.copyfile(content, partial / name)
        bundle.check_unchanged()
        move_folder(partial, out, last=MANIFEST)


def upload(bundle: Bundle, address: Address) -> str:
    """Upload the repository's files in one commit, and return its id. A repository that is not there yet is made, and
    is private. Files that are only on the hub stay. Raises `HubError`, `BundleError`."""
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)
        for name, content in repository_files(bundle, address).items()
    ]
    disable_progress_bars()
    api, repository = HfApi(library_name=LIBRARY), address.repository
    with hub_errors(address), warnings.catch_warnings():
        # the cards' tables, which are no data set
        warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")
        api.create_repo(repository, private=True, exist_ok=True)
        bundle.check_unchanged()
        try:
            done = api.create_commit(
                repository, operations, commit_message=f"Bundle {bundle.digest}", revision=address.revision
            )
        except (RuntimeError, ValueError) as error:  # how the client tells what went wrong with one file, or the card
            raise HubError(f"{address}: the upload failed: {_line(error.__cause__ or error)}") from error
    return done.oid


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _card(bundle: Bundle, address: Address | None) -> str:
    manifest = bundle.manifest
    name = manifest.licence.strip()
    licence = name.lower() if name.lower() in LICENCES else None
    data = ModelCardData(
        license=licence or "other",
        license_name=None if licence else re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-") or "unnamed",
        library_name=LIBRARY,
        pipeline_tag="zero-shot-image-classification",
        tags=[*TAGS],
        base_model=manifest.clip.name.removeprefix(PREFIX) if manifest.clip.name.startswith(PREFIX) else None,
    )
    where = str(address) if address else f"{PREFIX}ORG/NAME"
    with bundle.open("MODEL_CARD.md") as stream:
        text = stream.read().decode().rstrip()
    return f"""---
{data.to_yaml().strip()}
---

{text}

## Pull and serve it

```sh
vitrine pull {where} --out bundles/pulled --digest {bundle.digest}
vitrine serve --bundle bundles/pulled
```
"""


def _attributes(bundle: Bundle) -> str:
    """Of the lines that match a file, the last holds."""
    large = [f"*.{end}" for end in LARGE]
    large += [
        name.replace(" ", "[[:space:]]")
        for name, entry in bundle.manifest.files.items()
        if entry.bytes > MOST_IN_GIT and PurePosixPath(name).suffix.removeprefix(".") not in LARGE
    ]
    return "* -text\n" + "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in large)
