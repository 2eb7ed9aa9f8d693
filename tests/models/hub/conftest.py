"""A hub on this machine in place of the real one, and a cache of the test's own."""

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import enable_progress_bars

from fake_hub import running_hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with running_hub() as hub:
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,  # a protocol of its own, with servers of its own
        }.items():
            monkeypatch.setattr(constants, name, value)
        yield hub
    enable_progress_bars()
