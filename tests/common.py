"""What many tests need: the repository, a free port, and the recipe of the tiny CLIP and its CLT."""

import json
import socket
from copy import deepcopy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LABELS = ("red circle", "green square", "blue triangle")
TINY_CLIP = {
    "embed_dim": 24,  # less than the width, as in every published CLIP
    "vision_cfg": {"image_size": 32, "patch_size": 8, "layers": 3, "width": 32, "head_width": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
RECIPE = """
name = "tiny"

[clip]
config = "clip/tiny.json"
weights = "clip/tiny.safetensors"

[data]
name = "drawn shapes"
licence = "CC0-1.0"
train = { kind = "folder", path = "train" }
val = { kind = "folder", path = "val" }
labels = ["red circle", "green square", "blue triangle"]
templates = ["a photo of a {}", "a drawing of one {}"]

[clt]
features = 64
k = 8

[training]
epochs = 4
images_per_step = 8
mixed_images = 16
learning_rate = 1e-2
warmup_steps = 2
decay_share = 0.5
cls_weight = 4
normalisation_images = 32
checkpoint_every = 3
workers = 0
"""


def timeless(log):
    """The lines of a run's log.jsonl without what the clock says."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [{key: line[key] for key in line.keys() - {"time", "tokens_per_second"}} for line in lines]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def with_stored_decoders(clt):
    """A CLT in float64, its decoders as the graphs of all tokens store them: 127 steps a row."""
    rounded = deepcopy(clt).double()
    for decoder in rounded.decoders:
        for weight in decoder.weights:
            step = weight.abs().amax(1, keepdim=True) / 127
            weight.copy_((weight / step).round() * step)
    return rounded
