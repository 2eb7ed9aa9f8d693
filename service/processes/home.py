"""Where BentoML and the server's processes write: checked before BentoML is imported, which fails with a traceback."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vitrine.models.errors import VitrineError

_FOLDERS = ("bentos", "models", "envs", "tmp")  # that BentoML makes in its home when it is imported


class HomeError(VitrineError):
    """Nothing can be written where something must be; the message says where, why and what to do."""


@contextmanager
def bentoml_home() -> Iterator[None]:
    """A home for BentoML that can be written: BENTOML_HOME, else ~/bentoml, else a folder that is removed at the end.

    Raises `HomeError` if BENTOML_HOME cannot be written, or no folder for temporary files, or there is no room.
    """
    temporary = None
    try:
        place = tempfile.gettempdir()
    except FileNotFoundError as error:
        raise HomeError(
            f"no folder for temporary files can be written ({error.strerror or error}); make space there, or set "
            "TMPDIR to a writable folder"
        ) from error
    try:
        if chosen := os.environ.get("BENTOML_HOME"):
            os.environ["BENTOML_HOME"] = str(_prepare_chosen(chosen))
        elif not _has_home():
            temporary = tempfile.mkdtemp(prefix="vitrine-home-")
            os.environ["BENTOML_HOME"] = temporary
        try:
            yield
        except OSError as error:
            raise HomeError(
                f"the server cannot start or continue: {error}; it needs space and permission to write in "
                f"{os.environ.get('BENTOML_HOME', '~/bentoml')} and {place}"
            ) from error
    finally:
        if temporary:
            del os.environ["BENTOML_HOME"]
            shutil.rmtree(temporary, ignore_errors=True)


def _prepare_chosen(chosen: str) -> Path:
    """The home that BENTOML_HOME names, absolute: the workers, which inherit it, run in another directory."""
    try:
        home = Path(os.path.expandvars(chosen)).expanduser().absolute()
        _prepare(home)
    except (OSError, RuntimeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise HomeError(
            f"BENTOML_HOME={chosen} cannot be written ({reason}); set it to a writable folder, or unset it"
        ) from error
    return home


def _has_home() -> bool:
    """Whether BentoML can write to ~/bentoml."""
    try:
        home = Path("~/bentoml").expanduser()  # RuntimeError: a user with neither HOME nor a name
        if home.is_absolute():
            _prepare(home)
    except (OSError, RuntimeError):
        return False
    return home.is_absolute()


def _prepare(home: Path) -> None:
    """Raises `OSError` where it cannot be written."""
    for name in _FOLDERS:
        (home / name).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=home):
        pass
