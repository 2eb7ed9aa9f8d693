"""Where edits lie, a folder's or a bundle's `edits/`, and whether they fit the bundle that they are to be used with."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath

from vitrine.models.bundle.bundle import Bundle
from vitrine.models.bundle.layout import MANIFEST
from vitrine.models.bundle.manifest import graphs_digest
from vitrine.models.bundle.sealing import seal
from vitrine.models.files.listing import json_files
from vitrine.models.files.names import check_name
from vitrine.models.files.problems import naming
from vitrine.models.files.writing import move_folder, prepare_folder
from vitrine.models.interventions.changes import Changes, InterventionError, Network, resolve
from vitrine.models.interventions.edit import Edit, EditError, parse_edit, read_edit

FOLDER = "edits"  # of a bundle
MAX_EDITS = 1_000  # in a folder: they are read before the service is ready


def read_edits(folder: Path) -> dict[str, Edit]:
    """Every NAME.json in a folder, by name. Raises `EditError`."""
    return {file.stem: read_edit(file) for file in json_files(folder, "edits", MAX_EDITS, EditError)}


def bundle_edits(bundle: Bundle) -> dict[str, Edit]:
    """The edits that a bundle brings along, by name, from the files that were verified. Raises `EditError`,
    `BundleError`."""
    edits = {}
    for name in bundle.manifest.files:
        path = PurePosixPath(name)
        if path.parts[:-1] == (FOLDER,) and path.suffix == ".json":
            with bundle.open(name) as stream:
                try:
                    edits[path.stem] = parse_edit(bundle.path / name, stream)
                except OSError as error:
                    raise EditError(f"{bundle.path / name} cannot be read: {error}") from error
    return edits


def changes_of(edit: Edit, bundle: Bundle, network: Network) -> Changes:
    """An edit as arrays. Raises `EditError` if it was made for another bundle, or changes what this one has not."""
    if edit.graphs != graphs_digest(bundle.manifest, edit.of_residual):
        raise EditError(
            f"edit {edit.name!r} was made for a different bundle, not for {bundle.manifest.name!r} at {bundle.path}, "
            f"whose features may mean something else; make it again for this bundle with `vitrine edit create`"
        )
    try:
        return resolve(edit.interventions, network, edit.mode)
    except InterventionError as error:
        raise EditError(f"edit {edit.name!r}: {error}") from error


def add_edits(bundle: Bundle, edits: Mapping[str, Edit], out: Path) -> Bundle:
    """Write to `out` the bundle with these edits, which replace those of the same name. Raises `EditError`,
    `FileError`."""
    check_name(out)
    if out.exists():
        raise EditError(f"{out} already exists, and a bundle is never changed; choose another place")
    prepare_folder(out.parent)
    with naming(out), tempfile.TemporaryDirectory(dir=out.parent, prefix=".bundle-") as scratch:
        partial = Path(scratch) / out.name
        shutil.copytree(bundle.path, partial, copy_function=shutil.copyfile)
        for folder in (partial, partial / FOLDER):
            folder.mkdir(exist_ok=True)
            folder.chmod(folder.stat().st_mode | 0o700)  # the other one may be read-only
        for name, edit in edits.items():
            (partial / FOLDER / f"{name}.json").write_text(edit.text(), encoding="utf-8")
        sealed = seal(partial, bundle.manifest)
        move_folder(partial, out, last=MANIFEST)
    return replace(sealed, path=out)
