"""CLIP zero-shot predictions, with an exact account of what made them.

One import name for three folders: `vitrine.models`, `vitrine.training` and `vitrine.service`. In a checkout they are
symbolic links to the folders next to this one; an installed Vitrine contains the folders themselves.

In Python, `vitrine.load(bundle)` gives an `Explainer`: `explain`, `classify`, `embed`, `card`, `intervene`.
"""

import os as _os
from typing import TYPE_CHECKING as _TYPE_CHECKING

from vitrine.telemetry import switch_off as _switch_off

_switch_off()

# A bento, or a checkout on a system without links, has neither: search the folders next to this one, too.
if not _os.path.isdir(_os.path.join(__path__[0], "models")):
    __path__.append(_os.path.dirname(__path__[0]))

if _TYPE_CHECKING:
    from vitrine.loading import load
    from vitrine.models.errors import VitrineError
    from vitrine.service.library.account import Account
    from vitrine.service.library.explainer import Explainer

__all__ = ["Account", "Explainer", "VitrineError", "load"]
# Each is imported when it is first named: every process of ours imports `vitrine`, and few need these.
_HOMES = {
    "Account": "vitrine.service.library.account",
    "Explainer": "vitrine.service.library.explainer",
    "VitrineError": "vitrine.models.errors",
    "load": "vitrine.loading",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'vitrine' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
