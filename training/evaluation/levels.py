"""From low to high level: what the features of residual SAEs answer to, by depth, without people
(`training.evaluation.unit_statistics`).

The paper had 6,600 features labelled by people and found position and curve detectors low and objects high (arXiv
2509.17401). Here every feature has figures instead, and beside them are chance, the same SAEs at their first weights,
untrained, and the channels of the standardised stream.

L blocks, B images, T tokens, P patches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from vitrine.models.clip.loading import Clip
from vitrine.models.dictionary.residual_sae import ResidualSaes, standardise
from vitrine.models.progress import Progress
from vitrine.training.data.activations import residual_streams
from vitrine.training.data.held_out import HeldOut
from vitrine.training.evaluation.code import Code
from vitrine.training.evaluation.measure import AT_ONCE
from vitrine.training.evaluation.sae_results import LayerLevels, Levels, UnitFigure
from vitrine.training.evaluation.unit_statistics import Batch, UnitStatistics

IMAGES = 512  # at most: chance, of ten classes, is then 2 % of a variance
ABOVE = 0.95  # quantile of the shuffled figures that a unit must exceed to be above chance


@torch.no_grad()
def levels(
    clip: Clip, saes: ResidualSaes, images: HeldOut, console: Console, *, seed: int = 0, training_seed: int = 0
) -> Levels:
    """Over a random sample of the images, the SAEs on the CLIP's device; training_seed: of their first weights."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:IMAGES].tolist()
    images = replace(images, indices=tuple(images.indices[position] for position in order))
    device, patches = clip.tower.visual.proj.device, clip.tower.tokens - 1
    present = images.label_of_class.unique()
    untrained = ResidualSaes(saes.architecture).eval().requires_grad_(False)
    untrained.initialise(torch.Generator().manual_seed(training_seed))
    untrained = untrained.to(device)

    def statistics(*units: int) -> list[UnitStatistics]:
        return [UnitStatistics(count, patches, len(present), device) for count in units]

    sizes = saes.architecture.features
    of_kinds = (statistics(*sizes), statistics(*sizes), statistics(*(saes.width,) * saes.layers))
    with Progress(console) as progress:
        task = progress.task("levels", len(images), "images")
        for pixels, batch in _batches(clip, images, present, device, seed):
            streams = residual_streams(clip.tower(pixels))
            if not of_kinds[0][0].images:
                untrained.calibrate(standardise(streams.flatten(1, 2)).x)  # as training begins
            for layer, stream in enumerate(streams):
                activations = (
                    Code(saes, layer, stream).values,
                    Code(untrained, layer, stream).values,
                    standardise(stream).x,
                )
                for of_layers, z in zip(of_kinds, activations, strict=True):
                    of_layers[layer].update(z[:, 1:], batch)
            task.advance(len(pixels))
    features, first, neurons = ([_figures(of_layer) for of_layer in of_layers] for of_layers in of_kinds)
    return Levels(images=len(images), classes=len(present), features=features, untrained=first, neurons=neurons)


def _batches(
    clip: Clip, images: HeldOut, present: Tensor, device: torch.device, seed: int
) -> Iterator[tuple[Tensor, Batch]]:
    """A few images at a time; classes are numbered among those present."""
    side = clip.tower.visual.patch_size
    generator = torch.Generator().manual_seed(seed)
    before: tuple[Tensor, Tensor] | None = None  # class and colours of the last image
    for all_pixels, all_truth in images.batches():
        for pixels, truth in zip(all_pixels.to(device).split(AT_ONCE), all_truth.split(AT_ONCE), strict=True):
            known = torch.searchsorted(present, truth) if len(present) else truth
            classes = known.where(truth >= 0, -1).to(device)
            colours = F.avg_pool2d(pixels, side).flatten(2).transpose(1, 2)  # normalised: linear in the colours
            last = before or (classes[-1:], colours[-1:])
            of_others = torch.cat([last[0], classes[:-1]]), torch.cat([last[1], colours[:-1]])
            places = torch.stack([torch.randperm(colours.shape[1], generator=generator) for _ in classes])
            yield pixels, Batch(classes, colours, *of_others, places.to(device))
            before = classes[-1:], colours[-1:]


def _figures(of_layer: UnitStatistics) -> LayerLevels:
    counted = of_layer.counted
    own, chance = of_layer.measured(), of_layer.measured(shuffled=True)

    def figure(name: str) -> UnitFigure | None:
        values, by_chance = (getattr(measured, name)[counted] for measured in (own, chance))
        values, by_chance = values[~values.isnan()], by_chance[~by_chance.isnan()]
        if not len(values) or not len(by_chance):
            return None
        low, median, high = (float(values.quantile(q)) for q in (0.25, 0.5, 0.75))
        return UnitFigure(
            median=median,
            low=low,
            high=high,
            chance=float(by_chance.median()),
            above=float((values > by_chance.quantile(ABOVE)).double().mean()),
            over_half=float((values > 0.5).double().mean()),
        )

    def median(values: Tensor) -> float | None:
        return float(values[counted].median()) if counted.any() else None

    return LayerLevels(
        units=len(counted),
        counted=int(counted.sum()),
        position=figure("position"),
        of_class=figure("of_class"),
        colour=figure("colour"),
        purity=figure("purity"),
        fires=median(of_layer.fires),
        spread=median(of_layer.spread),
        evenness=median(of_layer.evenness),
    )
