"""CLIP zero-shot predictions, served with an exact account of what made them.

One import name for three folders: `vitrine.models`, `vitrine.training` and `vitrine.service`. In a checkout they are
links to the folders beside this one; an installed Vitrine has the folders themselves in their place.
"""

import os

# A bento, or a checkout on a system without links, has neither: there the folders beside this one are looked in, too.
if not os.path.isdir(os.path.join(__path__[0], "models")):
    __path__.append(os.path.dirname(__path__[0]))
