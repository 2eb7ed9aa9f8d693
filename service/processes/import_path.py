"""The directory in which child processes must be started, so that they import this Vitrine.

BentoML and Ray put the working directory first on a worker's import path, and the caller's working directory may
contain a `vitrine.py` of its own.
"""

from pathlib import Path

import vitrine

PACKAGE_PARENT = Path(vitrine.__file__).parents[1]  # contains the package `vitrine`
