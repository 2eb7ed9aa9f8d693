"""Cascade-aware training: the CLT is fine-tuned while it runs in the MLPs' place, so that errors do not add up.

A CLT trained on CLIP's own activations has never seen what it meets when it replaces every MLP: inputs that its own
earlier errors have bent. Here the whole tower runs with all MLPs replaced, all tokens, gradients flowing through the
frozen attention blocks, and is compared with CLIP itself on the same images:

    replaced     under replacement |y_j - y'_j|^2 as in `run.objective`, y_j CLIP's own MLP output, y'_j the CLT's
    prediction   KL(p || p') between CLIP's zero-shot distribution over the recipe's labels and the replaced one's
    clean        the reconstruction on CLIP's own activations goes on, so that explanations of the unreplaced CLIP,
                 which is what is served, do not get worse

The three do not weigh alike. On a finished CLT of twelve layers the gradient of `replaced` is seven times that of
`clean`, that of `prediction` thirty times, and mostly noise: with equal weights Adam, which keeps the moments that the
reconstruction left (`training.run.run`), would follow the noise alone. Hence the small default weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax, normalize

from vitrine.models.clip.tower import Tower
from vitrine.models.dictionary.clt import CrossLayerTranscoder, SortedCode
from vitrine.models.dictionary.replacement import Replacement
from vitrine.training.data.activations import Normalisation, activations
from vitrine.training.recipes.recipe import CascadeSection
from vitrine.training.run.objective import Losses, Reconstruction


class Cascade(nn.Module):
    """The objective as a module: pixels [B, 3, H, W] -> `Losses` (unexplained: under replacement)."""

    def __init__(
        self,
        tower: Tower,
        reconstruction: Reconstruction,
        settings: CascadeSection,
        label_embeddings: Tensor,
        logit_scale: float,
    ) -> None:
        """label_embeddings: unit, [labels, D]."""
        super().__init__()
        self.tower, self.reconstruction, self.settings = tower, reconstruction, settings
        denormalised: Any = Denormalised(reconstruction.clt, reconstruction.normalisation)
        self.replacement = Replacement(tower, denormalised)
        self.label_embeddings: Tensor
        self.register_buffer("label_embeddings", label_embeddings)
        self.logit_scale = logit_scale

    def forward(self, pixels: Tensor, pressure: float = 0.0) -> Losses:
        """pressure: as in `Reconstruction`, for the clean part."""
        settings, size = self.settings, self.reconstruction.size
        with torch.no_grad():
            taps = self.tower(pixels)
            truth = self._log_probabilities(taps.residual_out)
        batch = activations(taps)
        clean = self.reconstruction(batch, pressure)

        replaced = self.replacement(pixels, range(self.tower.layers))
        normalised = self.reconstruction.normalisation.targets
        error = (normalised(replaced.mlp_out.flatten(1, 2)) - normalised(batch.mlp_out)).square().mean(-1)
        found = self._log_probabilities(replaced.residual)
        divergence = kl_div(found, truth, log_target=True, reduction="sum") / size.images
        total = (
            settings.replaced_weight * self.reconstruction.weighted(error, batch.is_cls)
            + settings.prediction_weight * divergence
        )
        return clean._replace(
            total=settings.clean_weight * clean.total + total * size.processes,
            unexplained=error.detach().sum(1) / (size.images * size.tokens),
        )

    def _log_probabilities(self, residual: Tensor) -> Tensor:
        embedding = normalize(self.tower.head(residual[:, 0]), dim=-1)
        return log_softmax(self.logit_scale * embedding.float() @ self.label_embeddings.T, dim=-1)


class Denormalised(nn.Module):
    """A CLT under training, which works on normalised activations, as one that works on raw ones."""

    def __init__(self, clt: CrossLayerTranscoder, normalisation: Normalisation) -> None:
        super().__init__()
        self.architecture, self.layers, self.width = clt.architecture, clt.layers, clt.width
        self.encoders = [_Encoder(clt, normalisation, layer) for layer in range(clt.layers)]
        self.decoders = [_Decoder(clt, normalisation, layer) for layer in range(clt.layers)]


class _Encoder:
    def __init__(self, clt: CrossLayerTranscoder, normalisation: Normalisation, layer: int) -> None:
        self.encoder, self.normalisation, self.layer = clt.encoders[layer], normalisation, layer

    def __call__(self, x: Tensor, is_cls: Tensor) -> SortedCode:
        n, i = self.normalisation, self.layer
        return self.encoder((x - n.in_mean[i]) / n.in_scale[i], is_cls)


class _Decoder:
    def __init__(self, clt: CrossLayerTranscoder, normalisation: Normalisation, layer: int) -> None:
        self.decoder, self.normalisation, self.layer = clt.decoders[layer], normalisation, layer

    def __call__(self, codes: list[SortedCode]) -> Tensor:
        n, j = self.normalisation, self.layer
        return self.decoder(codes) * n.out_scale[j] + n.out_mean[j]
