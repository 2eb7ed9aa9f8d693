"""Any tower that Vitrine accounts for, drawn at random: rows, remainder and heat map against float64.

The tolerances are those of the engine: every row within 1e-5 of the reference, relative to the largest possible logit
(the logit scale), |remainder| at most 1e-3.
"""

from copy import deepcopy

import numpy as np
import open_clip
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vitrine.models.account.heatmap import heat_map
from vitrine.models.account.ledger import Decomposition, ledger
from vitrine.models.bundle.layout import EVERY_OUTPUT
from vitrine.models.clip.tower import Tower
from vitrine.models.dictionary.clt import Architecture, CrossLayerTranscoder
from vitrine.models.graph.attribution import AttributionGraph

SCALE, FEATURES = 100.0, 24


@st.composite
def towers(draw):
    """open_clip's configuration of a small vision tower."""
    heads, head_width, patch = draw(st.integers(1, 3)), draw(st.sampled_from([4, 8])), draw(st.sampled_from([4, 8]))
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return {
        "embed_dim": draw(st.integers(2, 20)),
        "quick_gelu": draw(st.booleans()),
        "vision_cfg": {
            "image_size": [rows * patch, columns * patch],
            "patch_size": patch,
            "layers": draw(st.integers(1, 4)),
            "width": heads * head_width,
            "head_width": head_width,
            "no_ln_pre": draw(st.booleans()),
            "ls_init_value": draw(st.sampled_from([None, 0.1, 1.0])),
            "final_ln_after_pool": draw(st.booleans()),
        },
        "text_cfg": {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1},
    }


@st.composite
def transcoders(draw, layers, width):
    """A CLT with non-zero biases; budgets differ by layer."""
    sparsifier = draw(st.sampled_from(["relu_topk", "abs_topk", "jumprelu", "batch_topk"]))
    budgets = tuple(draw(st.integers(1, FEATURES)) for _ in range(layers))
    cross_layer = draw(st.booleans())
    clt = CrossLayerTranscoder(Architecture(layers, width, FEATURES, budgets, budgets, sparsifier, cross_layer))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    clt.initialise(generator)
    with torch.no_grad():
        for encoder, decoder in zip(clt.encoders, clt.decoders, strict=True):
            encoder.bias.normal_(std=0.3, generator=generator)
            decoder.bias.normal_(std=0.3, generator=generator)
            for tensor in encoder.sparsifier.state_dict().values():
                tensor.fill_(0.2)
    return clt.eval().requires_grad_(False)


@torch.no_grad()
def random_visual(config, seed):
    """A tower whose every weight is random, biases and LayerNorms included, so that nothing is 0 or 1 by chance."""
    visual = open_clip.CLIP(**config).eval().visual
    generator = torch.Generator().manual_seed(seed)
    for name, weight in visual.named_parameters():
        weight += (0.3 if weight.ndim == 1 else 0.1) * torch.randn(weight.shape, generator=generator)
        if name.endswith(("proj", "embedding")):
            weight.normal_(std=0.5, generator=generator)
    return visual.requires_grad_(False)


@torch.no_grad()
def reference(visual, clt, pixels, parts):
    """Components of the [CLS] residual [R, d] and rows in logits for unit directions, by the formulas, in float64.

    The active features are taken from `parts`: where two tie, float32 may choose the other."""
    tower, clt = Tower(deepcopy(visual).double()), deepcopy(clt).double()
    taps = tower(pixels.double()[None])
    read, mlp_out = taps.mlp_in[:, 0, 0], taps.mlp_out[:, 0, 0]
    written = torch.zeros_like(mlp_out)
    for decoder in clt.decoders:
        for source, weight in zip(decoder.sources, decoder.weights, strict=True):
            active = parts.feature_indices[source][parts.feature_values[source] != 0]
            encoder = clt.encoders[source]
            activations = encoder.weight[active] @ read[source] + encoder.bias[active]
            written[source] += activations @ weight[active]
    bias = torch.stack([decoder.bias for decoder in clt.decoders]).sum(0)
    error = mlp_out.sum(0) - written.sum(0) - bias
    prior = taps.residual_in[:, 0]
    components = torch.cat([prior, taps.attn_out[:, 0, 0], written, bias[None], error[None]])
    residual, ln = taps.residual_out[0, 0], tower.visual.ln_post
    sigma = (residual.var(correction=0) + ln.eps).sqrt()
    rows = (ln.weight * (components - components.mean(-1, keepdim=True)) / sigma) @ tower.visual.proj
    rows[-2] += ln.bias @ tower.visual.proj
    return (rows / tower.head(residual).norm()).numpy()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(config=towers(), seed=st.integers(0, 2**31), data=st.data())
def test_any_tower_has_an_exact_ledger_and_heat_map(config, seed, data):
    visual = random_visual(config, seed)
    tower = Tower(visual)
    clt = data.draw(transcoders(tower.layers, tower.width))
    pixels = torch.randn(2, 3, *tower.image_size, generator=torch.Generator().manual_seed(seed))
    graph = AttributionGraph(tower, clt, torch.zeros(tower.layers, tower.width), torch.float32)
    outputs = dict(zip(EVERY_OUTPUT, (output.numpy() for output in graph(pixels)), strict=True))
    direction = np.random.default_rng(seed).standard_normal(tower.embedding).astype(np.float32)
    direction /= np.linalg.norm(direction)
    fold = tower.attention_fold().numpy()
    for image in range(2):
        parts = Decomposition.from_batch(outputs, image, with_details=True)
        result = ledger(parts, direction, SCALE)
        assert abs(result.remainder) <= 1e-3
        expected = SCALE * (reference(visual, clt, pixels[image], parts) @ direction)
        rows = np.array([result.prior, *result.attention, *result.clt, result.bias, result.error])
        np.testing.assert_allclose(rows, expected, rtol=1e-5, atol=1e-5 * SCALE)
        heatmap = heat_map(parts, parts.details, fold, direction, SCALE)
        sums = heatmap.patches.sum(1) + heatmap.class_token + heatmap.constant
        np.testing.assert_allclose(sums, expected[1 : 1 + tower.layers], rtol=1e-5, atol=1e-5 * SCALE)
        np.testing.assert_allclose(heatmap.heads.sum(1), heatmap.patches.sum(1), rtol=1e-5, atol=1e-5 * SCALE)
        assert heatmap.patches.shape == (tower.layers, tower.tokens - 1)
