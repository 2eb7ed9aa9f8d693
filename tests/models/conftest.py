"""A CLT of any architecture with random weights, and random tokens for it."""

import pytest
import torch

from vitrine.models.dictionary.clt import Architecture, CrossLayerTranscoder


@pytest.fixture(scope="session")
def random_clt():
    """random_clt(layers=3, width=4, features=7, k=2, k_cls=k, seed=0, dtype=float64, **architecture) -> a CLT.

    k and k_cls: one number, or one a layer.
    """

    def make(layers=3, width=4, features=7, k=2, k_cls=None, seed=0, dtype=torch.float64, **architecture):
        budgets = [(budget,) * layers if isinstance(budget, int) else budget for budget in (k, k_cls or k)]
        clt = CrossLayerTranscoder(Architecture(layers, width, features, *budgets, **architecture)).to(dtype)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in clt.named_parameters():
            if name.endswith("log_threshold"):
                torch.nn.init.uniform_(parameter, -3, 0, generator=generator)
            else:
                torch.nn.init.normal_(parameter, generator=generator)
        return clt

    return make


@pytest.fixture(scope="session")
def random_tokens():
    """random_tokens(clt, count, seed=1) -> ln_2 outputs [L, N, d], is_cls [N], a gradient for the outputs [L, N, d]."""

    def draw(clt, tokens, seed=1):
        generator, dtype = torch.Generator().manual_seed(seed), clt.decoders[0].bias.dtype
        x, d_out = (torch.randn(clt.layers, tokens, clt.width, generator=generator, dtype=dtype) for _ in range(2))
        return x, torch.rand(tokens, generator=generator) < 0.4, d_out

    return draw
