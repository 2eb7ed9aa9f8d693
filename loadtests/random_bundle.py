"""A bundle of a published CLIP's shape with random weights: to measure speed, which does not depend on them.

python loadtests/random_bundle.py build/b32-random --shape b32 --features 6144 --k 32
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import vitrine  # noqa: F401  # first: it stops the libraries' telemetry

# isort: split
import open_clip
import torch
import typer
from safetensors.torch import save_file

from vitrine.models.bundle.manifest import Data, Metrics
from vitrine.models.clip.loading import load_clip
from vitrine.models.dictionary.clt import Architecture, CrossLayerTranscoder
from vitrine.models.export.export import Provenance, export_bundle

SHAPES = {"b32": "ViT-B-32", "b16": "ViT-B-16"}
LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def main(
    out: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    shape: Annotated[str, typer.Option(help=", ".join(SHAPES))] = "b32",
    features: Annotated[int, typer.Option(help="F, features a layer.")] = 6144,
    k: Annotated[int, typer.Option(help="Active features a token and layer.")] = 32,
) -> None:
    """Write it; takes some minutes and, for the defaults, 8 GB of memory."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch) / "random.safetensors"
        random = open_clip.create_model(SHAPES[shape])
        save_file({name: tensor.contiguous() for name, tensor in random.state_dict().items()}, weights)
        clip = load_clip(SHAPES[shape], str(weights), quick_gelu=False)
    layers, width = clip.tower.layers, clip.tower.width
    clt = CrossLayerTranscoder(Architecture(layers, width, features, (k,) * layers, (k,) * layers))
    clt.initialise(torch.Generator().manual_seed(0))
    provenance = Provenance(
        name=f"{shape}-random",
        description=f"{SHAPES[shape]}'s shape with random weights. It knows nothing: for load tests alone.",
        labels=LABELS,
        templates=("a photo of a {}",),
        data=Data(name="none", licence="none", train_images=0, val_images=0),
        recipe="",
        metrics=Metrics(),
        licence="Apache-2.0",
    )
    export_bundle(clip, clt.eval().requires_grad_(False), torch.zeros(layers, width), provenance, out, "float16")


if __name__ == "__main__":
    typer.run(main)
