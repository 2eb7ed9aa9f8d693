"""API keys. They are compared as digests in constant time, so that timing reveals neither characters nor length."""

from __future__ import annotations

import hashlib
import hmac
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
                lines = file.read_text().splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise SettingsError(f"{PREFIX}{name.upper()}_FILE={file} cannot be read: {error}") from error
            entries += [line for line in lines if not line.lstrip().startswith("#")]
        keys = {key.strip() for key in entries} - {""}
        if not keys and not (value is None and file is None):
            raise SettingsError(f"{PREFIX}{name.upper()} and {PREFIX}{name.upper()}_FILE name no key")
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        """Whether a key is required."""
        return bool(self._digests)

    def accept(self, authorization: str) -> bool:
        """Whether the header `Authorization: Bearer KEY` has a valid key. All keys are always compared."""
        scheme, _, key = authorization.partition(" ")
        digest = _digest(key.strip())
        matches = [hmac.compare_digest(digest, valid) for valid in self._digests]
        return scheme.lower() == "bearer" and any(matches)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
