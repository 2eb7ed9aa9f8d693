"""A hub on this machine in place of the real one, and a cache of the test's own."""

import pytest
from huggingface_hub.utils import enable_progress_bars

from fake_hub import asked_hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with asked_hub(monkeypatch, tmp_path / "cache") as hub:
        yield hub
    enable_progress_bars()
