"""What was left out of some inputs: how many by reason, and the first names. Said once, in a few lines."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from vitrine.models.files.names import printable

SHOWN = 3  # names of each reason


class Reason(Enum):
    """Why something was left out; the value completes "left out, ...: 3"."""

    LITTER = "hidden files, or files of an operating system"
    OTHER = "not images, judging by their names"
    NO_IMAGE = "without an extension, and not images, judging by their first bytes"
    BESIDE = "of a different kind than the files being read (tar, Parquet, images)"
    SPECIAL = "not regular files"
    LOOP = "folders that contain themselves, or that too many links lead to"
    FOLDER = "folders that cannot be read"
    LINK = "links that lead to no image in their tar"
    SPARSE = "stored with holes (sparse), which is not supported"
    BROKEN = "damaged or missing"
    NO_LABEL = "images outside the folders of labels"
    EMPTY = "folders of labels without images (add images, or remove the folders)"
    NO_PICTURE = "samples without an image"
    EXTRA = "additional images of a sample"
    NO_SAMPLE = "not images, classes or texts of samples"
    NO_OBJECTS = "without a class, or without objects"


@dataclass
class Skipped:
    """Counts and first names by reason; a folder that is left out counts as one."""

    counts: dict[Reason, int] = field(default_factory=dict)
    names: dict[Reason, list[str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)  # about what was not left out

    def add(self, reason: Reason, name: str, detail: str = "") -> None:
        """Count one. detail: what is wrong with this one."""
        count = self.counts.get(reason, 0)
        self.counts[reason] = count + 1
        if count < SHOWN or reason is Reason.BROKEN:  # each of these is named: it may be a thousand images
            shown = printable(name) + (f": {detail}" if detail else "")
            self.names.setdefault(reason, []).append(shown)

    def take(self, other: Skipped) -> None:
        """Add what another has counted."""
        for reason, count in other.counts.items():
            before = self.names.get(reason, [])
            most = None if reason is Reason.BROKEN else SHOWN
            self.names[reason] = (before + other.names[reason])[:most]
            self.counts[reason] = self.counts.get(reason, 0) + count
        self.warnings += other.warnings

    def total(self) -> int:
        """How many were left out."""
        return sum(self.counts.values())

    def lines(self) -> list[str]:
        """A line for each reason, then the warnings."""
        lines = []
        for reason, count in self.counts.items():
            names = self.names[reason]
            more = f" and {count - len(names):,} more" if count > len(names) else ""
            lines.append(f"left out, {reason.value}: {count:,} ({'; '.join(names)}{more})")
        return lines + self.warnings
