"""How well a dictionary's outputs match their targets, per layer and token type, as sums per image. A CLT's targets are
the MLPs' outputs, those of residual SAEs the streams after the blocks.

    MSE             mean of |y - y'|^2 / d over tokens
    R^2             1 - sum |y - y'|^2 / sum |y - mean y|^2 over tokens and dimensions (variance-weighted); [CLS] and
                    patches about their own means, all tokens about theirs; a dictionary's R^2 is the mean over layers
    R^2, kept       the same over the tokens that are no outliers, about the mean of those
    outliers        share of tokens with |y| > 3 median |y|: in a pretrained ViT a few tokens a hundred times as long as
                    the others own the variance, and R^2 says little about the others
    relative error  median of |y - y'| / |y| over tokens; a token with y = 0 has 0 if y' = 0, else infinity
    cosine          mean of cos(y, y') over tokens
    L0              mean number of active features per token
    dead            share of features that fired for no token

Means and medians of |y| come from a survey (`survey.py`). R^2 is exact whatever centres the survey gave: the sums are
taken about these and moved to the mean of the tokens seen at the end. Its intervals, by bootstrap over images, keep the
means fixed. The median of the relative error is exact: that of every token is kept, 4 L T bytes an image.

L layers, n images, B images of a batch, T tokens, d width, F features; 3 token types: all, [CLS], patches.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitrine.models.account.windows import TOKENS, Tokens
from vitrine.models.bootstrap import Bootstrap
from vitrine.models.dictionary.clt import CrossLayerTranscoder
from vitrine.models.dictionary.replacement import of_type
from vitrine.models.dictionary.residual_sae import ResidualSaes
from vitrine.models.dictionary.sparse_products import SortedCode
from vitrine.training.data.normalisation import OUTLIER
from vitrine.training.evaluation.results import LayerFigures, TokenFigures
from vitrine.training.evaluation.survey import Survey

ERROR, TOTAL, COSINE, L0 = range(4)  # sums over an image's tokens


class Reconstruction:
    """Accumulates the figures of one dictionary.

    Args:
        dictionary: the CLT or the SAEs.
        survey: of the targets of these images, or of a sample of them.
        bootstrap: over these images, for the intervals.
    """

    def __init__(self, dictionary: CrossLayerTranscoder | ResidualSaes, survey: Survey, bootstrap: Bootstrap) -> None:
        self._bootstrap, self._seen = bootstrap, 0
        layers, width, features = dictionary.layers, dictionary.width, dictionary.features
        self._moved_resampled = torch.zeros(bootstrap.resamples, 3, layers, width)  # of every resample
        device = dictionary.decoders[0].bias.device
        self._sizes = torch.tensor([encoder.sparsifier.features for encoder in dictionary.encoders])  # F by layer
        self.layers, self.width, self.tokens = layers, width, 0
        self.centres = survey.means.to(device)  # [3, L, d]
        self.longest = (OUTLIER * survey.median_norms).to(device)  # [L]
        self.fired = torch.zeros(2, layers, features, dtype=torch.bool, device=device)  # [CLS], patches
        self._images: list[Tensor] = []  # [4, 3, B, L]
        self._relative: list[Tensor] = []  # [L, B, T], float32
        self._moved = torch.zeros(3, layers, width, dtype=torch.float64)  # sum of y - centre
        # Tokens that are no outliers: their number, sums of |y - y'|^2 and |y - centre|^2, sum of y - centre.
        self._kept = torch.zeros(3, 3, layers, dtype=torch.float64)
        self._kept_moved = torch.zeros(3, layers, width, dtype=torch.float64)

    def update(self, truth: Tensor, decoded: Sequence[Tensor], codes: list[SortedCode]) -> None:
        """Targets [L, B, T, d] and the dictionary's outputs, by layer; codes over the B * T tokens."""
        images, self.tokens = truth.shape[1], truth.shape[2]
        sums = torch.zeros(4, 3, images, self.layers, dtype=torch.float64)
        relative, moved = torch.empty(truth.shape[:3]), torch.empty(images, 3, self.layers, self.width)
        for layer, code in enumerate(codes):
            y, output, active = truth[layer].double(), decoded[layer].double(), code.values != 0
            norms, error = y.norm(dim=-1), (y - output).square().sum(-1)
            cosine = (y * output).sum(-1) / (norms * output.norm(dim=-1)).clamp_min(1e-16)
            count = active.sum(-1).view(images, -1).double()
            kept = norms <= self.longest[layer]
            relative[layer] = relative_error(error.sqrt(), norms).cpu()
            for kind, tokens in enumerate(TOKENS):
                chosen, mask = of_type(y - self.centres[kind, layer], tokens), of_type(kept, tokens).double()
                total = chosen.square().sum(-1)
                parts = (of_type(error, tokens), total, of_type(cosine, tokens), of_type(count, tokens))
                sums[:, kind, :, layer] = torch.stack([part.sum(-1) for part in parts]).cpu()
                by_image = chosen.sum(1).cpu()
                self._moved[kind, layer] += by_image.sum(0)
                moved[:, kind, layer] = by_image.float()
                kept_sums = torch.stack([mask.sum(), (mask * parts[ERROR]).sum(), (mask * total).sum()])
                self._kept[:, kind, layer] += kept_sums.cpu()
                self._kept_moved[kind, layer] += torch.einsum("bt,btd->d", mask, chosen).cpu()
            for kind, tokens in enumerate(TOKENS[1:]):
                indices, is_active = (of_type(part.view(images, self.tokens, -1), tokens) for part in (code[0], active))
                self.fired[kind, layer, indices[is_active]] = True
        drawn = torch.from_numpy(self._bootstrap.drawn(self._seen, images))
        self._moved_resampled += torch.einsum("rb,bkld->rkld", drawn, moved)
        self._seen += images
        self._images.append(sums)
        self._relative.append(relative)

    def figures(self) -> dict[Tokens, TokenFigures]:
        """The figures of every token type; R^2 with intervals."""
        bootstrap = self._bootstrap
        sums = torch.cat(self._images, dim=2)  # [4, 3, n, L]
        images, relative = sums.shape[2], torch.cat(self._relative, dim=1)
        fired = torch.stack([self.fired.any(0), *self.fired]).double().sum(-1).cpu() / self._sizes
        figures = {}
        for kind, tokens in enumerate(TOKENS):
            count = images * (self.tokens, 1, self.tokens - 1)[kind]
            error, total, cosine, l0 = sums[:, kind].sum(1)
            move = self._moved[kind] / count  # from the centre to the mean
            total = total - count * move.square().sum(-1)
            along = torch.einsum("rld,ld->rl", self._moved_resampled[:, kind].double(), move)
            change = (count * move.square().sum(-1) - 2 * along) / images
            totals = bootstrap.means(sums[TOTAL, kind].numpy()) + change.numpy()
            resampled = 1 - bootstrap.means(sums[ERROR, kind].numpy()) / totals
            kept, kept_error, kept_total = self._kept[:, kind]
            kept_total = kept_total - self._kept_moved[kind].square().sum(-1) / kept.clamp_min(1)
            columns: dict[str, Tensor] = {
                "mse": error / count / self.width,
                "r2": 1 - error / total,
                "r2_kept": torch.where(kept > 1, 1 - kept_error / kept_total, torch.nan),
                "outliers": 1 - kept / count,
                "relative_error": median_by_layer(of_type(relative, tokens, dim=2)),
                "cosine": cosine / count,
                "l0": l0 / count,
                "dead_share": 1 - fired[kind],
            }
            rows = zip(*(column.tolist() for column in columns.values()), strict=True)
            layers = [LayerFigures(**_named(columns, row)) for row in rows]
            means: dict[str, Any] = _named(columns, [column.nanmean().item() for column in columns.values()])
            means["r2"] = bootstrap.interval(columns["r2"].mean().item(), resampled.mean(1))
            figures[tokens] = TokenFigures(layers=layers, **means)
        return figures


def _named(names: Iterable[str], values: Iterable[float]) -> dict[str, Any]:
    """None for a figure that there is not."""
    return {
        name: None if name == "r2_kept" and value != value else value for name, value in zip(names, values, strict=True)
    }


def relative_error(error: Tensor, norms: Tensor) -> Tensor:
    """|y - y'| / |y|; 0 where both are 0."""
    return torch.where(error > 0, error / norms, 0.0)


def median_by_layer(values: Tensor) -> Tensor:
    """The median of every layer of values [L, ...], the mean of the middle two if their number is even: [L]."""
    return torch.from_numpy(np.median(values.flatten(1).numpy(), axis=1).astype(np.float64))
