"""API keys: who may ask. Compared in constant time, as digests, so that neither a key's letters nor its length tell."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from pydantic import SecretStr

from vitrine.service.operations.settings import PREFIX, SettingsError


class Keys:
    """The keys of one of the settings `<name>` (separated by commas) and `<name>_file` (one a line, # for remarks).

    Raises `SettingsError` for a file that cannot be read or where keys are asked for and none is given: that would
    open what was to be closed.
    """

    def __init__(self, name: str, given: SecretStr | None, file: Path | None) -> None:
        found = given.get_secret_value().split(",") if given else []
        if file is not None:
            try:
                lines = file.read_text().splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise SettingsError(f"{PREFIX}{name.upper()}_FILE={file} cannot be read: {error}") from error
            found += [line for line in lines if not line.lstrip().startswith("#")]
        keys = {key.strip() for key in found} - {""}
        if not keys and not (given is None and file is None):
            raise SettingsError(f"{PREFIX}{name.upper()} and {PREFIX}{name.upper()}_FILE name no key")
        self._digests = [_digest(key) for key in keys]

    def __bool__(self) -> bool:
        """Whether a key is asked for."""
        return bool(self._digests)

    def accept(self, authorization: str) -> bool:
        """Whether the header `Authorization: Bearer KEY` has one of them. All are compared, whichever it is."""
        scheme, _, key = authorization.partition(" ")
        given = _digest(key.strip())
        found = [hmac.compare_digest(given, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(found)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()
