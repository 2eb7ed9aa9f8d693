"""Cascade-aware training: the CLT is fine-tuned while it replaces the MLPs, so that errors do not accumulate.

A CLT trained on CLIP's own activations has never seen its inputs under full replacement, which are shifted by its own
errors in earlier layers. Here the whole tower runs with all MLPs replaced for all tokens, gradients flow through the
frozen attention blocks, and the result is compared with CLIP itself on the same images:

    replaced     under replacement |y_j - y'_j|^2 as in `run.objective`, y_j CLIP's own MLP output, y'_j the CLT's
    prediction   KL(p || p') between CLIP's zero-shot distribution over the recipe's labels and the replaced model's
    clean        the reconstruction on CLIP's own activations is still trained, so that explanations of the unreplaced
                 CLIP, which is the one served, do not get worse

The gradients of the three differ in size. On a trained CLT of twelve layers the gradient of `replaced` is seven times
that of `clean`, that of `prediction` thirty times, and mostly noise: with equal weights Adam, which keeps its moments
from the reconstruction phase (`training.run.run`), would follow only the noise. Hence the small default weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax, normalize

from vitrine.models.clip.tower import Tower
from vitrine.models.dictionary.clt import CrossLayerTranscoder
from vitrine.models.dictionary.replacement import Replacement
from vitrine.models.dictionary.sparse_products import SortedCode
from vitrine.training.data.activations import Activations
from vitrine.training.data.normalisation import Normalisation
from vitrine.training.recipes.recipe import CascadeSection
from vitrine.training.run.objective import Losses, Objective, Reconstruction


class Cascade(Objective):
    """The objective as a module: pixels [B, 3, H, W] -> `Losses` (what is `unexplained` is so under replacement)."""

    def __init__(
        self,
        tower: Tower,
        reconstruction: Reconstruction,
        settings: CascadeSection,
        label_embeddings: Tensor,
        logit_scale: float,
    ) -> None:
        """label_embeddings: [labels, D], normalised to length 1."""
        super().__init__(reconstruction.dictionary, reconstruction.settings, reconstruction.size)
        self.tower, self.reconstruction, self.weights = tower, reconstruction, settings
        denormalised: Any = Denormalised(reconstruction.dictionary, reconstruction.normalisation)
        self.replacement = Replacement(tower, denormalised)
        self.label_embeddings: Tensor
        self.register_buffer("label_embeddings", label_embeddings)
        self.logit_scale = logit_scale

    def forward(self, pixels: Tensor, pressure: float = 0.0, dead: Tensor | None = None) -> Losses:
        """pressure: as in `Reconstruction`, for the clean part; dead features stay so."""
        settings, size = self.weights, self.size
        with torch.no_grad():
            taps = self.tower(pixels)
            truth = self._log_probabilities(taps.residual_out)
        batch = Activations.of(taps)
        clean = self.reconstruction(batch, pressure)

        replaced = self.replacement(pixels, range(self.tower.layers))
        normalised = self.reconstruction.normalisation.targets
        error = (normalised(replaced.mlp_out.flatten(1, 2)) - normalised(batch.mlp_out)).square().mean(-1)
        predicted = self._log_probabilities(replaced.residual)
        divergence = kl_div(predicted, truth, log_target=True, reduction="sum") / size.images
        total = (
            settings.replaced_weight * self.reconstruction.weighted(error, batch)
            + settings.prediction_weight * divergence
        )
        unexplained, variance = self.reconstruction.unexplained(error, batch)
        unexplained_cls, variance_cls = self.reconstruction.unexplained_cls(error, batch)
        return clean._replace(
            total=settings.clean_weight * clean.total + total * size.processes,
            unexplained=unexplained,
            variance=variance,
            unexplained_cls=unexplained_cls,
            variance_cls=variance_cls,
        )

    def _log_probabilities(self, residual: Tensor) -> Tensor:
        embedding = normalize(self.tower.head(residual[:, 0]), dim=-1)
        return log_softmax(self.logit_scale * embedding.float() @ self.label_embeddings.T, dim=-1)


class Denormalised(nn.Module):
    """Adapts a CLT in training, which uses normalised activations, to raw activations."""

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
