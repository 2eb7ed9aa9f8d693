"""The environment of a Ray of this machine alone, which asks nobody anything and leaves nothing behind.

Ray's defaults listen on the network, and where a machine stands in it is asked by its address; a token is written to
~/.ray; and even with its usage statistics off it asks the metadata services of three clouds which of them it runs in,
unless ~/ray_bootstrap_config.yaml says so.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def ray_alone() -> Iterator[None]:
    """Must be entered before Ray is imported. Where RAY_ADDRESS names a cluster nothing is changed."""
    if os.environ.get("RAY_ADDRESS"):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="vitrine-ray-") as home:
        (Path(home) / "ray_bootstrap_config.yaml").write_text("{}\n")
        # The second name notwithstanding, it is read on Linux, too: off means that 127.0.0.1 is used.
        changes = {"HOME": home, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
        before = {name: os.environ.get(name) for name in changes}
        os.environ.update(changes)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
