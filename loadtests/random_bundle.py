"""Writes a bundle with a published CLIP's shape and random weights: to measure speed, which does not depend on them.

python loadtests/random_bundle.py build/b32-random --shape b32 --features 6144 --k 32 --sources --fp16
"""

from __future__ import annotations

import json
import logging
import tempfile
from pathlib import Path
from typing import Annotated

import vitrine  # noqa: F401  # first: it stops the libraries' telemetry

# isort: split
import torch
import typer
from safetensors.torch import save_file

from engine import SMALL, Shape, load
from vitrine.models.bundle.bundle import Bundle
from vitrine.models.bundle.layout import Variant
from vitrine.models.bundle.manifest import Data, Metrics
from vitrine.models.clip.loading import load_clip
from vitrine.models.dictionary.clt import Architecture, CrossLayerTranscoder
from vitrine.models.export.export import Provenance, export_bundle

LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def write_bundle(
    out: Path, shape: Shape, features: int, k: int, sources: bool = False, variants: tuple[Variant, ...] = ()
) -> Bundle:
    """Write and open a bundle with `features` features a layer, `k` of which are active; with source accounts, and with
    those of `variants` that agree with float32 on noise."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        weights, config = Path(scratch) / "random.safetensors", Path(scratch) / f"{shape}.json"
        save_file({name: tensor.contiguous() for name, tensor in load(shape).state_dict().items()}, weights)
        name = None if shape in SMALL else f"ViT-B-{shape[1:]}"
        if name is None:
            config.write_text(json.dumps(SMALL[shape]))
        clip = load_clip(name, str(weights), None if name else config, quick_gelu=False)
    logging.disable(logging.NOTSET)  # `load` has silenced warnings
    layers, width = clip.tower.layers, clip.tower.width
    clt = CrossLayerTranscoder(Architecture(layers, width, features, (k,) * layers, (k,) * layers))
    clt.initialise(torch.Generator().manual_seed(0))
    clt.eval().requires_grad_(False)
    provenance = Provenance(
        name=f"{shape}-random",
        description=f"The shape {shape} with random weights. It knows nothing; it is only for load tests.",
        labels=LABELS,
        templates=("a photo of a {}",),
        data=Data(name="none", licence="none", train_images=0, val_images=0),
        recipe="",
        metrics=Metrics(),
        licence="Apache-2.0",
    )
    noise = [torch.randn(8, 3, *clip.tower.image_size, generator=torch.Generator().manual_seed(1))]
    return export_bundle(
        clip,
        clt,
        torch.zeros(layers, width),
        provenance,
        out,
        "float16",
        variants=variants,
        calibration=noise if variants else (),
        sources=sources,
    )


def main(
    out: Annotated[Path, typer.Argument(help="Folder of the bundle.")],
    shape: Annotated[Shape, typer.Option(help="Shape of the CLIP.")] = Shape.B32,
    features: Annotated[int, typer.Option(help="F, number of features per layer.")] = 6144,
    k: Annotated[int, typer.Option(help="Number of active features per token and layer.")] = 32,
    sources: Annotated[bool, typer.Option("--sources", help="Include the graphs of source accounts.")] = False,
    fp16: Annotated[bool, typer.Option("--fp16", help="Include a vision graph in half precision, for GPUs.")] = False,
) -> None:
    """Write a bundle with random weights; this takes some minutes and, with the defaults, 8 GB of memory."""
    write_bundle(out, shape, features, k, sources, ("fp16",) if fp16 else ())


if __name__ == "__main__":
    typer.run(main)
