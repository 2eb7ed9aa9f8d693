"""Prometheus and promtool, where this machine has them."""

import os
import shutil

import pytest


@pytest.fixture(scope="session")
def find_program():
    """find_program("promtool") -> its path; skips where it is missing, fails there with VITRINE_REQUIRE_PROMETHEUS."""

    def find(name):
        path = shutil.which(name)
        if path is None:
            reason = f"{name} is not installed (Debian: apt-get install prometheus)"
            if os.environ.get("VITRINE_REQUIRE_PROMETHEUS"):
                pytest.fail(reason)
            pytest.skip(reason)
        return path

    return find
