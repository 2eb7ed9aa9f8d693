"""How well a CLT stands in for the MLPs, on held-out images: R^2, cosine, dead features, the CLIP's zero-shot top-1.

R^2 of a layer is 1 - sum |y - y'|^2 / sum |y - mean y|^2 over tokens and dimensions (torchmetrics' variance-weighted
R2Score); a CLT's is the mean over layers. [CLS] alone is measured about its own mean.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torchmetrics import MeanMetric, R2Score

from models.bundle import Metrics
from models.clip import Clip
from models.clt import CrossLayerTranscoder
from training.activations import activations
from training.data import DataError, Folder, image_folder, load


@torch.no_grad()
def evaluate(
    clip: Clip,
    clt: CrossLayerTranscoder,
    val: Path,
    labels: tuple[str, ...],
    templates: tuple[str, ...],
    console: Console,
    batch_size: int = 50,
) -> tuple[Metrics, int]:
    """(metrics, number of images) over the class folders `val`, whose names must be among `labels`."""
    folder = val_folder(clip, val, labels)
    to_label = torch.tensor([labels.index(name) for name in folder.classes])
    label_embeddings = clip.encode_labels(list(labels), list(templates))

    r2, r2_cls = _r2_per_layer(clt), _r2_per_layer(clt)
    cosine, top1 = _float64(MeanMetric()), _float64(MeanMetric())
    fired = torch.zeros(clt.layers, clt.features, dtype=torch.bool)
    order = list(torch.arange(len(folder)).split(batch_size))
    data = load(folder, [batch.tolist() for batch in order], workers=1)
    for pixels, classes in track(data, "evaluate", len(order), console=console):
        taps = clip.tower(pixels)
        batch = activations(taps)
        code = clt.encode(batch.mlp_in)
        decoded = clt.decode(code)
        for layer in range(clt.layers):
            truth, found = batch.mlp_out[layer].double(), decoded[layer].double()
            r2[layer].update(found, truth)
            r2_cls[layer].update(found[batch.is_cls], truth[batch.is_cls])
        cosine.update(torch.cosine_similarity(decoded, batch.mlp_out, dim=-1))
        fired |= _fired(code.indices, code.values, clt.features)
        predicted = (clip.tower.head(taps.residual_out[:, 0]) @ label_embeddings.T).argmax(-1)
        top1.update((predicted == to_label[classes]).double())
    metrics = Metrics(
        r2=_mean(r2),
        cosine=cosine.compute().item(),
        r2_cls=_mean(r2_cls),
        dead_share=1 - fired.double().mean().item(),
        zero_shot_top1=top1.compute().item(),
    )
    return metrics, len(folder)


def val_folder(clip: Clip, val: Path, labels: tuple[str, ...]) -> Folder:
    """The val images. Raises `DataError` if there are none, or in class folders that are no labels."""
    folder = image_folder(val, clip.transform())
    if strangers := sorted(set(folder.classes) - set(labels)):
        raise DataError(f"{val}: class folders that are no labels of the recipe: {', '.join(strangers)}")
    return folder


def _r2_per_layer(clt: CrossLayerTranscoder) -> list[R2Score]:
    return [_float64(R2Score(multioutput="variance_weighted")) for _ in range(clt.layers)]


def _float64(metric: Any) -> Any:
    """A torchmetrics metric that accumulates in float64: sums over millions of tokens."""
    return metric.set_dtype(torch.float64)


def _mean(scores: list[R2Score]) -> float:
    return torch.stack([score.compute() for score in scores]).mean().item()


def _fired(indices: Tensor, values: Tensor, features: int) -> Tensor:
    """Which features are active anywhere in a code: [L, N, k] -> bool [L, F]."""
    counts = torch.zeros(indices.shape[0], features)
    return counts.scatter_add_(1, indices.flatten(1), (values > 0).float().flatten(1)) > 0
