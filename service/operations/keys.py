"""API keys. They are compared as digests in constant time, so that timing reveals neither characters nor length."""

from __future__ import annotations

import hashlib
import hmac
from contextlib import suppress
from pathlib import Path

from pydantic import SecretStr

from vitrine.service.operations.settings import PREFIX, SettingsError


class Keys:
    """The keys of one of the settings `<name>` (comma-separated) and `<name>_file` (one per line, # for comments).

    Raises `SettingsError` for a file that cannot be read, or if a setting is given but names no key: that would allow
    access that should be restricted.
    """

    def __init__(self, name: str, value: SecretStr | None, file: Path | None) -> None:
        entries = value.get_secret_value().split(",") if value else []
        if file is not None:
            try:
                lines = file.read_text("utf-8-sig").splitlines()  # some editors put a mark before UTF-8
            except (OSError, UnicodeDecodeError) as error:
                raise SettingsError(f"{PREFIX}{name.upper()}_FILE={file} cannot be read: {error}") from error
            entries += [line for line in lines if not line.lstrip().startswith("#")]
        keys = {key.strip() for key in entries} - {""}
        if not keys and not (value is None and file is None):
            raise SettingsError(
                f"{PREFIX}{name.upper()} and {PREFIX}{name.upper()}_FILE have no key; add one, or unset both"
            )
        self._digests = [_digest(spelling) for key in keys for spelling in _spellings(key)]

    def __bool__(self) -> bool:
        """Whether a key is required."""
        return bool(self._digests)

    def accept(self, authorization: str) -> bool:
        """Whether the header `Authorization: Bearer KEY`, its bytes decoded as Latin-1, has a valid key. All keys are
        always compared."""
        scheme, _, key = authorization.encode("latin-1", "replace").partition(b" ")
        digest = _digest(key.strip(b" \t"))
        matches = [hmac.compare_digest(digest, valid) for valid in self._digests]
        return scheme.lower() == b"bearer" and any(matches)


def _spellings(key: str) -> set[bytes]:
    """The bytes that clients send for a key: UTF-8, as most do, or Latin-1, as browsers do."""
    spellings = {key.encode(errors="surrogateescape")}
    with suppress(UnicodeEncodeError):
        spellings.add(key.encode("latin-1"))
    return spellings


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
