"""How well a bundle's labels fit images of its kind: what a service can hold the cosines of other images against."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitrine.models.bundle.manifest import FIT_IMAGES, FIT_SHARE, LabelFit
from vitrine.models.clip.loading import Clip
from vitrine.models.progress import Progress


@torch.no_grad()
def label_fit(clip: Clip, images: Sequence[Tensor], labels: NDArray[np.float32], progress: Progress) -> LabelFit | None:
    """The cosine of an image and its best label that `FIT_SHARE` of the images do not reach.

    Args:
        images: batches of normalised pixels [B, 3, H, W].
        labels: unit embeddings [N, D].

    Returns None for fewer than `FIT_IMAGES` images: the lowest of a few says little.
    """
    count = sum(map(len, images))
    if count < FIT_IMAGES:
        return None
    task, best = progress.task("fit of the labels", count, "images"), list[NDArray[np.float32]]()
    for pixels in images:
        embeddings = clip.model.encode_image(pixels, normalize=True).numpy()
        best.append((embeddings @ labels.T).max(axis=1))
        task.advance(len(pixels))
    return LabelFit(images=count, low_cosine=float(np.quantile(np.concatenate(best), FIT_SHARE)))
