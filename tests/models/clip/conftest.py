"""CLIPs that are as if built into open_clip, and a hub that has weights of one."""

import json

import open_clip
import pytest
from open_clip.pretrained import _PRETRAINED, _pcfg

from common import TINY_CLIP
from fake_hub import asked_hub


@pytest.fixture(scope="session", autouse=True)
def built_in(tmp_path_factory):
    """Configurations of the tiny CLIP by name: of either activation, of GELU alone, and of larger images."""
    folder = tmp_path_factory.mktemp("configurations")
    tiny = TINY_CLIP | {"text_cfg": TINY_CLIP["text_cfg"] | {"vocab_size": 64}}
    larger = tiny | {"vision_cfg": TINY_CLIP["vision_cfg"] | {"image_size": 64}}
    for name, config in {
        "small": tiny,
        "small-quickgelu": tiny | {"quick_gelu": True},
        "single": tiny,
        "small-64": larger,
    }.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder / f"{name}.json")


@pytest.fixture
def one_tokenizer(monkeypatch, clip):
    """Let every CLIP have the same tokenizer: making one takes longer than all else of a small CLIP."""
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda name: clip.tokenizer)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that open_clip has two tags of `small` on: `gelu`, and `quick`, of QuickGELU and of a file by its name."""
    tags = {
        "gelu": _pcfg(hf_hub="org/small/"),
        "quick": _pcfg(hf_hub="org/quick/weights.bin", quick_gelu=True, mean=(0.1, 0.2, 0.3)),
    }
    monkeypatch.setitem(_PRETRAINED, "small", tags)
    with asked_hub(monkeypatch, tmp_path / "cache") as hub:
        yield hub
