"""An edit: interventions that are kept, as a file NAME.json, with their evidence; identified by its digest.

    format, name, description, created
    mode             direct or rerun: `models.interventions.spec` says what each leaves out
    interventions    what is changed
    condition        which images it is for; null: all of them
    graphs           the bundle that it was made for (`models.bundle.manifest.graphs_digest`)
    evidence         whatever there is to say for it, as JSON: measured effect, cards, prompts, the data's name
    digest           sha256 of all of this as canonical JSON: keys sorted, no spaces, UTF-8
    signature        optional: HMAC-SHA256 of the digest by a secret key

The digest is of the file's JSON as it was written, so that fields with defaults that a later version adds change none.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator, model_validator

from vitrine.models.errors import VitrineError
from vitrine.models.files.reading import open_regular
from vitrine.models.interventions.spec import Intervention, Mode

FORMAT = 1
NONE = "none"  # what a request says that wants no edit, not even the default one
MAX_BYTES = 2**20  # of one file
MAX_INTERVENTIONS = 1_024
MIN_KEY_BYTES, MAX_KEY_BYTES = 16, 4_096
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_OUTSIDE_DIGEST = ("digest", "signature")


class EditError(VitrineError, ValueError):
    """An edit cannot be used; the message names it and the problem."""


class Condition(BaseModel):
    """Which images an edit is applied to: exactly one of these. The others are answered as if there were no edit.

    `activation_at_least` is read off the plain run, before the edit is made; the others compare the two predictions.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    activation_at_least: float | None = Field(
        default=None, gt=0, description="|activation| at [CLS] of any of the edit's features"
    )
    moves_logit: float | None = Field(
        default=None, gt=0, description="by how much the edit changes the lead of the unedited top-1 over its runner-up"
    )
    changes_prediction: Literal[True] | None = Field(default=None, description="the edit changes the top-1")

    @model_validator(mode="after")
    def _one(self) -> Self:
        if len(named := self.model_dump(exclude_none=True)) != 1:
            names = ", ".join(type(self).model_fields)
            raise ValueError(f"give exactly one of {names}, not {', '.join(named) or 'none'}")
        return self

    @property
    def compares(self) -> bool:
        """Whether the two predictions are compared, and so labels needed."""
        return self.activation_at_least is None


class Edit(BaseModel):
    """The contents of an edit's file; `create` makes one, `parse_edit` reads one and checks its digest."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    format: Literal[1] = 1
    name: str
    description: Annotated[str, Field(min_length=1, max_length=2_000)]
    created: datetime
    mode: Mode
    interventions: Annotated[tuple[Intervention, ...], Field(min_length=1, max_length=MAX_INTERVENTIONS)]
    condition: Condition | None = None
    graphs: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
    evidence: dict[str, JsonValue] = {}
    digest: Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
    signature: Annotated[str, Field(pattern=r"^hmac-sha256:[0-9a-f]{64}$")] | None = None

    @field_validator("name")
    @classmethod
    def _plain(cls, name: str) -> str:
        check_edit_name(name)
        return name

    @model_validator(mode="after")
    def _condition_can_be_told(self) -> Self:
        features = [item for item in self.interventions if item.index is not None and item.dictionary == "clt"]
        if self.condition is not None and not self.condition.compares and not features:
            raise ValueError("`activation_at_least` requires features of the CLT, but this edit changes none")
        return self

    @property
    def of_residual(self) -> bool:
        """Whether features of residual SAEs are changed."""
        return any(item.dictionary == "residual" for item in self.interventions)

    def text(self) -> str:
        """As it is written to a file."""
        return json.dumps(_fields(self), indent=2, ensure_ascii=False) + "\n"


def create(
    name: str,
    description: str,
    interventions: tuple[Intervention, ...],
    mode: Mode,
    graphs: str,
    *,
    condition: Condition | None = None,
    evidence: dict[str, JsonValue] | None = None,
    key: bytes | None = None,
) -> Edit:
    """An edit as of now, with its digest, and signed if there is a key. graphs: of the bundle that it is for.

    Raises `EditError`.
    """
    fields: dict[str, Any] = {"name": name, "description": description, "mode": mode, "graphs": graphs}
    fields |= {"interventions": interventions, "condition": condition, "evidence": evidence or {}}
    fields |= {"created": datetime.now(UTC).replace(microsecond=0), "digest": "sha256:" + "0" * 64}
    try:
        draft = Edit.model_validate(fields)
        digest = _digest(_fields(draft))
        edit = draft.model_copy(
            update={"digest": digest, "signature": None if key is None else _signature(digest, key)}
        )
        size = len(edit.text().encode())
    except ValidationError as error:
        raise EditError(f"edit {name[:100]!r}: {_problem(error)}") from error
    except (ValueError, RecursionError) as error:  # evidence that is no JSON in UTF-8
        raise EditError(f"edit {name[:100]!r}: {error}") from error
    if size > MAX_BYTES:
        raise EditError(
            f"edit {name!r} would have {size:,} bytes, but at most {MAX_BYTES:,} are accepted; give less evidence"
        )
    return edit


def check_edit_name(name: str) -> None:
    """Raise `EditError` for a name that cannot be."""
    if name == NONE or not _NAME.fullmatch(name):
        raise EditError(
            f"{name[:100]!r}: the name of an edit must consist of at most 64 lower-case letters, digits, '.', '_' and "
            f"'-', and must not be {NONE!r}, which means no edit"
        )


def read_edit(file: Path) -> Edit:
    """Read one file. Raises `EditError`."""
    try:
        with open_regular(file) as stream:
            return parse_edit(file, stream)
    except OSError as error:
        raise EditError(f"{file} cannot be read: {error}") from error


def parse_edit(file: Path, stream: BinaryIO) -> Edit:
    """The contents of an opened file, which is as it was written. Raises `EditError`; `OSError` if it cannot be
    read."""
    raw = stream.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise EditError(f"{file} is larger than {MAX_BYTES:,} bytes, too large for an edit")
    try:
        fields = json.loads(raw.decode(), parse_constant=_refuse_constant, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise EditError(f"{file} is not JSON: {error}") from error
    if not isinstance(fields, dict) or "format" not in fields:
        raise EditError(f"{file} is not an edit: it has no `format`")
    if fields["format"] != FORMAT:
        raise EditError(f"{file} has the format {fields['format']!r:.40}; this version of Vitrine reads {FORMAT}")
    try:
        edit = Edit.model_validate(fields)
        digest = _digest(fields)
    except ValidationError as error:
        raise EditError(f"{file}: {_problem(error)}") from error
    except (ValueError, RecursionError) as error:
        raise EditError(f"{file}: {error}") from error
    if edit.digest != digest:
        raise EditError(
            f"{file} was changed after it was made: its digest does not match; make it again, or restore it"
        )
    if file.stem != edit.name:
        raise EditError(f"{file} is the edit {edit.name!r}: name the file {edit.name}.json")
    return edit


def check_signature(edit: Edit, key: bytes) -> None:
    """Raise `EditError` unless the edit is signed by this key."""
    if edit.signature is None:
        raise EditError(f"edit {edit.name!r} is not signed; sign it with `vitrine edit create --key-file`")
    if not hmac.compare_digest(edit.signature, _signature(edit.digest, key)):
        raise EditError(f"edit {edit.name!r} is signed by another key")


def read_key(file: Path) -> bytes:
    """The secret key in a file, without white space around it. Raises `EditError`."""
    try:
        with open_regular(file) as stream:
            key = stream.read(MAX_KEY_BYTES + 1).strip()
    except OSError as error:
        raise EditError(f"the key file {file} cannot be read: {error}") from error
    if not MIN_KEY_BYTES <= len(key) <= MAX_KEY_BYTES:
        raise EditError(
            f"the key file {file} must have {MIN_KEY_BYTES} to {MAX_KEY_BYTES:,} bytes, for example from `openssl "
            f"rand -hex 32`"
        )
    return key


def _fields(edit: Edit) -> dict[str, Any]:
    """What is written, without fields that are not set. Defaults are, so that no later version reads another one."""
    return edit.model_dump(mode="json", exclude_none=True) | {"evidence": edit.evidence}


def _digest(fields: dict[str, Any]) -> str:
    """Raises `ValueError` for what is no JSON."""
    content = {name: value for name, value in fields.items() if name not in _OUTSIDE_DIGEST}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()


def _signature(digest: str, key: bytes) -> str:
    return "hmac-sha256:" + hmac.new(key, digest.encode(), hashlib.sha256).hexdigest()


def _problem(error: ValidationError) -> str:
    """The first one."""
    first = error.errors(include_url=False)[0]
    location = ".".join(map(str, first["loc"]))
    return f"{location + ': ' if location else ''}{first['msg'].removeprefix('Value error, ')}"


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Two readers may take another of two values of the same name."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a name is given twice")
    return fields
