"""Class folders as a `Listing`: path/<class>/*.jpg, links followed."""

from __future__ import annotations

import os
from pathlib import Path

from vitrine.models.files.names import display
from vitrine.models.inputs.classes import by_class, class_name
from vitrine.models.inputs.errors import InputError
from vitrine.models.inputs.files import read_file
from vitrine.models.inputs.folder import walk
from vitrine.models.inputs.skipped import Reason, Skipped
from vitrine.models.inputs.source import Files
from vitrine.training.data.images import DataError


class ClassFolders:
    """The images in folders of classes, or in a folder without these, and then without classes."""

    def __init__(self, root: Path, has_classes: bool = True) -> None:
        """has_classes: False if the folders are no classes. Raises `DataError` if there are no images."""
        self.title, self.root, self.unlabelled = display(root), root, ""
        skipped = Skipped()
        try:
            found = walk(root, skipped)
        except InputError as error:
            remedy = "" if root.exists() else "; a recipe's paths are relative to --data-root or VITRINE_DATA"
            raise DataError(f"no images under {self.title}: {error}{remedy}") from error
        for path in (*found.tars, *found.tables):
            skipped.add(Reason.BESIDE, path)
        files = Files("folder", root, found.images, skipped)
        self.classes, files = by_class(files) if has_classes else ((), files)
        if not files.paths:
            raise DataError(". ".join([f"no images under {self.title}", *skipped.lines()]))
        # Files of a folder come before those of its folders: the order in which earlier versions numbered them.
        self.paths = sorted(files.paths, key=lambda path: path.rpartition("/")[::2])
        self.skipped = files.skipped
        self._indices = {name: index for index, name in enumerate(self.classes)}
        if not self.classes:
            self.unlabelled = (
                "its images are not in folders named after classes"
                if has_classes
                else "the recipe sets classes = false"
            )

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return display(self.root / self.paths[index])

    def read(self, index: int) -> tuple[bytes, int]:
        path = self.paths[index]
        return read_file(os.path.join(self.root, path)), self._indices.get(class_name(path), 0)
