"""The edits that a bundle is served with, and what each makes of an image.

What the operator names (`VITRINE_EDITS`, `VITRINE_EDIT`) must be usable, or the bundle is refused. What the bundle
brings along may be out of use here, for a reason that is told to whoever asks for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account.ledger import Decomposition, logits
from vitrine.models.bundle.bundle import Bundle
from vitrine.models.interventions import direct
from vitrine.models.interventions.changes import Changes, Network
from vitrine.models.interventions.conditions import applied
from vitrine.models.interventions.edit import NONE, Edit, EditError, check_signature, read_key
from vitrine.models.interventions.edit_files import bundle_edits, changes_of, read_edits
from vitrine.models.interventions.network import BundleNetwork
from vitrine.service.engine.engine import Engine
from vitrine.service.engine.rerun import RerunGraph
from vitrine.service.errors import ServiceError
from vitrine.service.operations.settings import Settings
from vitrine.service.schemas.edits import EditSummary, EditUsed


class Edited(NamedTuple):
    """What an image's answer is made of."""

    parts: Decomposition
    applied: bool


@dataclass(frozen=True)
class ServedEdit:
    """An edit, ready to be applied; its changes are resolved once."""

    edit: Edit
    changes: Changes
    bundle: Bundle
    problem: str = ""  # why it cannot be used here

    @property
    def is_direct(self) -> bool:
        """Whether it is made in what the vision graph returns, with components."""
        return self.edit.mode == "direct"

    @property
    def needs_details(self) -> bool:
        """Whether the vision graph has to say what each head wrote."""
        return self.is_direct and bool(np.any(self.changes.heads != 1))

    @property
    def needs_plain(self) -> bool:
        """Whether the plain run is needed, to be edited or to be compared with."""
        return self.is_direct or self.edit.condition is not None

    @property
    def needs_labels(self) -> bool:
        """Whether labels decide to which images it is applied."""
        return self.edit.condition is not None and self.edit.condition.compares

    def may_apply(self, plain: Decomposition) -> bool:
        """Whether it is worth making, by the plain run alone."""
        condition = self.edit.condition
        if condition is None or condition.activation_at_least is None:
            return True
        active = (
            np.abs(plain.feature_values[layer][plain.feature_indices[layer] == index]).max(initial=0.0)
            for layer, index in self._features
        )
        return max(active) >= condition.activation_at_least

    def directly(self, plain: Decomposition, labels: NDArray[np.floating] | None) -> Edited:
        """The edited decomposition of an image's plain one, or that one. labels [N, D]: needed if `needs_labels`."""
        if not self.may_apply(plain):
            return Edited(plain, False)
        return self.compared(plain, direct.changed(plain, self.changes, self.bundle), labels)

    def compared(self, plain: Decomposition, edited: Decomposition, labels: NDArray[np.floating] | None) -> Edited:
        """Which of the two is the answer."""
        if not self.needs_labels:
            return Edited(edited, True)
        assert labels is not None
        assert self.edit.condition is not None
        scale = self.bundle.manifest.logit_scale
        before, after = (logits(parts.embedding, labels, scale)[None] for parts in (plain, edited))
        made = bool(applied(self.edit.condition, before, after)[0])
        return Edited(edited if made else plain, made)

    def used(self, applied: bool) -> EditUsed:
        """As answers name it."""
        return EditUsed(name=self.edit.name, digest=self.edit.digest, mode=self.edit.mode, applied=applied)

    @property
    def summary(self) -> EditSummary:
        """As `/v1/model` lists it."""
        edit = self.edit
        return EditSummary(
            name=edit.name,
            digest=edit.digest,
            description=edit.description,
            created=edit.created,
            mode=edit.mode,
            interventions=len(edit.interventions),
            condition=edit.condition,
            signed=edit.signature is not None,
            problem=self.problem or None,
        )

    @cached_property
    def _features(self) -> list[tuple[int, int]]:
        """(layer, index) of the features that a condition looks at."""
        return [
            (item.layer, item.index)
            for item in self.edit.interventions
            if item.layer is not None and item.index is not None and item.dictionary == "clt"
        ]


class Edits:
    """The edits of a bundle in service, by name."""

    def __init__(self, named: Mapping[str, ServedEdit], default: str | None = None) -> None:
        """default: of these, for requests that name none."""
        self.named, self.default = named, default

    def chosen(self, name: str | None) -> ServedEdit | None:
        """What a request names, else the default one. Raises `ServiceError` if there is none of that name, or if it
        cannot be used here."""
        name = self.default if name is None else name
        if name is None or name == NONE:
            return None
        if (served := self.named.get(name)) is None:
            raise _unknown(name, self.named)
        if served.problem:
            raise ServiceError("invalid_request", f"edit: {served.problem}")
        return served


def named_edit(bundle: Bundle, settings: Settings, name: str | None) -> Edit | None:
    """The edit that a request names, else the settings', before any graph is loaded. Raises `ServiceError`,
    `EditError`."""
    name = settings.edit if name is None else name
    if name is None or name == NONE:
        return None
    named = bundle_edits(bundle) | (read_edits(settings.edits) if settings.edits else {})
    if name not in named:
        raise _unknown(name, named)
    return named[name]


def load_edits(engine: Engine, settings: Settings) -> Edits:
    """The bundle's edits and those in the folder that the settings name, which replace the bundle's of the same name.

    Raises `EditError` for a file that is no edit, for one that does not fit the bundle, and for the folder's or the
    default one if it cannot be used.
    """
    key = read_key(settings.edit_key_file) if settings.edit_key_file else None
    bundle = engine.bundle
    network: Network | None = None  # a bundle from before interventions has none, and needs none without edits
    named = dict[str, ServedEdit]()
    from_folder = read_edits(settings.edits) if settings.edits else {}
    for edits, must_work in ((bundle_edits(bundle), False), (from_folder, True)):
        for name, edit in edits.items():
            network = network or BundleNetwork(bundle)
            served = serve(edit, engine, network, key)
            if must_work and served.problem:
                raise EditError(served.problem)
            named[name] = served
    default = settings.edit
    if default is not None and default != NONE:
        if default not in named:
            names = ", ".join(named) or "none"
            raise EditError(f"VITRINE_EDIT={default[:100]}: there is no such edit; the edits are: {names}")
        if named[default].problem:
            raise EditError(named[default].problem)
    return Edits(named, None if default == NONE else default)


def serve(edit: Edit, engine: Engine, network: Network | None = None, key: bytes | None = None) -> ServedEdit:
    """An edit, ready to be applied unless it has a `problem`. Raises `EditError` if it does not fit the bundle."""
    changes = changes_of(edit, engine.bundle, network or BundleNetwork(engine.bundle))
    return ServedEdit(edit, changes, engine.bundle, _problem(edit, engine, key))


def run_edited(
    engine: Engine, edit: ServedEdit | None, pixels: NDArray[np.float32], labels: NDArray[np.floating]
) -> list[Edited]:
    """Pixels [B, 3, H, W] with an edit, here and now: for use without a service. labels [N, D]."""
    if edit is None:
        return [Edited(parts, False) for parts in engine.explain(pixels)]
    if not edit.needs_plain:
        return [Edited(parts, True) for parts in rerun(engine, edit, pixels)]
    count = len(pixels)
    plain = engine.explain(pixels, [edit.needs_details] * count, [edit.is_direct] * count)
    if edit.is_direct:
        return [edit.directly(parts, labels) for parts in plain]
    found = [Edited(parts, False) for parts in plain]
    if wanted := [place for place, parts in enumerate(plain) if edit.may_apply(parts)]:
        for place, parts in zip(wanted, rerun(engine, edit, pixels[wanted]), strict=True):
            found[place] = edit.compared(plain[place], parts, labels)
    return found


def rerun(engine: Engine, edit: ServedEdit, pixels: NDArray[np.float32]) -> list[Decomposition]:
    """The running network with the edit, of pixels [B, 3, H, W]."""
    assert engine.rerun is not None  # see `_problem`
    return engine.rerun.run(pixels, [edit.changes] * len(pixels))


def rerun_graph(engine: Engine, edit: ServedEdit) -> RerunGraph:
    """The graph in which `rerun` makes the edit; to be opened first."""
    assert engine.rerun is not None  # see `_problem`
    return engine.rerun.of(edit.changes.dictionary)


def _unknown(name: str, named: Iterable[str]) -> ServiceError:
    return ServiceError("unknown_edit", f"there is no edit {name[:100]!r}; the edits are: {', '.join([NONE, *named])}")


def _problem(edit: Edit, engine: Engine, key: bytes | None) -> str:
    """Why an edit cannot be used here; "" if it can."""
    if key is not None:
        try:
            check_signature(edit, key)
        except EditError as error:
            return f"{error}; VITRINE_EDIT_KEY_FILE requires edits signed with its key"
    if edit.mode == "direct" and not engine.has_components:
        return (
            f"edit {edit.name!r} is direct, but the bundle's vision graph gives no components; export the bundle again"
        )
    if edit.mode == "rerun" and engine.rerun is None:
        return f"edit {edit.name!r} has the mode rerun, which needs the bundle's rerun graph and VITRINE_RERUN=true"
    return ""
