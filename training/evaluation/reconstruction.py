"""How well a CLT's outputs match those of the MLPs, per layer and token type, as sums per image.

    MSE      mean of |y - y'|^2 / d over tokens
    R^2      1 - sum |y - y'|^2 / sum |y - mean y|^2 over tokens and dimensions (variance-weighted); [CLS] and patches
             about their own means, all tokens about theirs; a CLT's R^2 is the mean over layers
    cosine   mean of cos(y, y') over tokens
    L0       mean number of active features per token
    dead     share of features that fired for no token

The means come from a first pass over the same images, so that each image has its own part of both sums in R^2, and the
bootstrap can resample images (it keeps the means fixed).

L layers, n images, B images of a batch, T tokens, d width, F features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vitrine.models.account.windows import TOKENS, Tokens
from vitrine.models.dictionary.clt import CrossLayerTranscoder, SortedCode
from vitrine.training.evaluation.bootstrap import Bootstrap
from vitrine.training.evaluation.results import LayerFigures, TokenFigures


class Reconstruction:
    """Accumulates the figures of one CLT.

    Args:
        clt: the CLT.
        means: mean MLP output [3, L, d] over all tokens, [CLS], patches.
    """

    def __init__(self, clt: CrossLayerTranscoder, means: Tensor) -> None:
        self.layers, self.width = clt.layers, clt.width
        self.means = means.to(clt.decoders[0].bias.device)
        self.fired = torch.zeros(3, clt.layers, clt.features, dtype=torch.bool)
        self.tokens = 0
        self._batches: list[Tensor] = []  # [4, 3, B, L]: error, total, cosine, L0 summed over an image's tokens

    def update(self, truth: Tensor, decoded: Tensor, codes: list[SortedCode]) -> None:
        """MLP outputs and CLT outputs [L, B, T, d]; codes over the B * T tokens."""
        images, self.tokens = truth.shape[1], truth.shape[2]
        sums = torch.zeros(4, 3, images, self.layers, dtype=torch.float64)
        for layer, code in enumerate(codes):
            y, output, active = truth[layer].double(), decoded[layer].double(), code.values != 0
            per_token = torch.stack(
                [
                    (y - output).square().sum(-1),
                    torch.zeros_like(y[..., 0]),
                    torch.cosine_similarity(y, output, dim=-1),
                    active.sum(-1).view(images, -1).double(),
                ]
            )
            for kind, tokens in enumerate(TOKENS):
                chosen = chosen_tokens(per_token, tokens)
                chosen[1] = (chosen_tokens(y[None], tokens)[0] - self.means[kind, layer]).square().sum(-1)
                sums[:, kind, :, layer] = chosen.sum(-1).cpu()
                fired = chosen_tokens(code.indices.view(1, images, self.tokens, -1), tokens)[0]
                fired = fired[chosen_tokens(active.view(1, images, self.tokens, -1), tokens)[0]]
                self.fired[kind, layer, fired.cpu()] = True
        self._batches.append(sums)

    def figures(self, bootstrap: Bootstrap) -> dict[Tokens, TokenFigures]:
        """The figures of every token type; R^2 with intervals."""
        sums = torch.cat(self._batches, dim=2)  # [4, 3, n, L]
        counts = torch.tensor([self.tokens, 1, self.tokens - 1], dtype=torch.float64)[:, None]
        figures = {}
        for kind, tokens in enumerate(TOKENS):
            error, total, cosine, l0 = sums[:, kind].mean(1)
            r2 = 1 - error / total
            resampled = 1 - bootstrap.means(sums[0, kind].numpy()) / bootstrap.means(sums[1, kind].numpy())
            columns = {
                "mse": error / counts[kind] / self.width,
                "r2": r2,
                "cosine": cosine / counts[kind],
                "l0": l0 / counts[kind],
                "dead_share": 1 - self.fired[kind].double().mean(-1),
            }
            rows = zip(*(column.tolist() for column in columns.values()), strict=True)
            layers = [LayerFigures(**dict(zip(columns, row, strict=True))) for row in rows]
            means = {name: column.mean().item() for name, column in columns.items()}
            means["r2"] = bootstrap.interval(means["r2"], resampled.mean(1))
            figures[tokens] = TokenFigures(layers=layers, **means)
        return figures


def chosen_tokens(values: Tensor, tokens: Tokens) -> Tensor:
    """The tokens of one type, from values [m, B, T, ...]; a copy."""
    return {"all": values, "cls": values[:, :, :1], "patches": values[:, :, 1:]}[tokens].clone()
