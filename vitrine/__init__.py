"""CLIP zero-shot predictions, with an exact account of what made them.

One import name for three folders: `vitrine.models`, `vitrine.training` and `vitrine.service`. In a checkout they are
symbolic links to the folders beside this one; an installed Vitrine contains the folders themselves.
"""

import os as _os

from vitrine.telemetry import switch_off as _switch_off

_switch_off()

# A bento, or a checkout on a system without links, has neither: search the folders beside this one, too.
if not _os.path.isdir(_os.path.join(__path__[0], "models")):
    __path__.append(_os.path.dirname(__path__[0]))
