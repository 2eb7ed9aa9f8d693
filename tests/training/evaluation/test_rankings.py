"""Scores of features by each ranking: against the served account, finite differences and dense sums."""

import pytest
import torch
import torch.nn.functional as F

from common import with_stored_decoders
from vitrine.models.bundle.layout import SOURCES_OUTPUTS, TRACE_OUTPUTS
from vitrine.models.clip.tower import Tower
from vitrine.models.dictionary.average import mean_code
from vitrine.models.graph.sources import SourcesGraph
from vitrine.models.graph.trace import TraceGraph
from vitrine.training.evaluation.gradients import written_gradients
from vitrine.training.evaluation.rankings import NODE_RANKINGS, Rankings


@pytest.fixture
def direction(clip):
    generator = torch.Generator().manual_seed(1)
    return F.normalize(torch.randn(clip.tower.embedding, generator=generator), dim=-1)


@pytest.fixture
def make_rankings(clip, make_clt, make_pixels):
    def make(**architecture):
        clt = make_clt(clip, **architecture)
        clt = with_stored_decoders(clt).float().eval()  # the graphs' decoders
        mean = mean_code(clip.tower, clt, [make_pixels(4, seed=9)])
        return Rankings(clip, clt, mean, seed=0)

    return make


def served(clip, clt, pixels, direction):
    """The source account as it is served: (trace, outputs of the sources graph)."""
    outputs = TraceGraph(clip.tower, clt, torch.float32)(pixels)
    trace = {name: part[0] for name, part in zip(TRACE_OUTPUTS, outputs, strict=True)}
    start = clip.tower.fold()[0] @ direction * (clip.logit_scale / trace["scale"])
    last = torch.tensor([clip.tower.layers]), torch.tensor([0]), torch.tensor([0])
    graph = SourcesGraph(clip.tower, clt, torch.float32)
    found = graph(start[None], *last, *(part[0] for part in outputs[3:]))
    return trace, dict(zip(SOURCES_OUTPUTS, found, strict=True))


def by_feature(indices, values, features):
    """[L, T, k] -> [L, T, F]"""
    return torch.zeros(*indices.shape[:2], features).scatter_add(-1, indices, values)


@pytest.mark.parametrize("cross_layer", [True, False])
@pytest.mark.parametrize("sparsifier", ["relu_topk", "abs_topk"])
def test_sources_are_the_served_account(clip, make_rankings, make_pixels, direction, sparsifier, cross_layer):
    rankings = make_rankings(k=6, k_cls=9, sparsifier=sparsifier, cross_layer=cross_layer)
    pixels, clt = make_pixels(1, seed=2), rankings.clt
    scores, active = rankings(pixels, direction)
    assert scores.keys() == set(NODE_RANKINGS)
    trace, found = served(clip, clt, pixels, direction)
    activations = by_feature(trace["indices"], trace["values"], clt.features)
    assert torch.equal(active, (activations != 0).any(1))
    close = {"rtol": 1e-3, "atol": 1e-4}
    contributions = by_feature(trace["indices"], found["features"][0], clt.features)
    torch.testing.assert_close(scores["sources"], contributions.sum(1), **close)
    torch.testing.assert_close(scores["activation"], activations.sum(1), **close)


def test_sources_about_the_mean_are_linear_in_the_edit(clip, make_rankings, make_pixels, direction):
    """What a feature's score says: how much the held logit falls when it is set to its mean at every token."""
    rankings = make_rankings(k=6, k_cls=9)
    pixels, clt = make_pixels(1, seed=2), rankings.clt
    scores, _ = rankings(pixels, direction)
    gradients = written_gradients(
        clip.tower,
        pixels,
        lambda r: r @ rankings._straight(r.detach(), direction * clip.logit_scale),
        held=True,
    ).gradients
    trace, _ = served(clip, clt, pixels, direction)
    z = by_feature(trace["indices"], trace["values"], clt.features)  # [L, T, F]
    mean = rankings.mean[:, torch.arange(clip.tower.tokens).clamp_max(1)]  # [L, T, F]
    for source in range(clt.layers):
        per_unit = sum(
            gradients[target, 0] @ decoder.weights[source - decoder.sources[0]].T
            for target, decoder in enumerate(clt.decoders)
            if source in decoder.sources
        )
        expected = ((z[source] - mean[source]) * per_unit).sum(0)
        torch.testing.assert_close(scores["sources_mean"][source], expected, rtol=1e-3, atol=1e-4)


def test_direct_is_the_ledgers(clip, make_rankings, make_pixels, direction):
    rankings = make_rankings(k=6, k_cls=9)
    pixels, clt = make_pixels(1, seed=2), rankings.clt
    scores, _ = rankings(pixels, direction)
    trace, _ = served(clip, clt, pixels, direction)
    straight = clip.tower.fold()[0] @ direction * (clip.logit_scale / trace["scale"])
    z = by_feature(trace["indices"], trace["values"], clt.features)[:, 0]
    torch.testing.assert_close(scores["direct"], z * (clt.directions() @ straight), rtol=1e-3, atol=1e-5)


def test_true_gradients_are_finite_differences(any_clip, make_pixels):
    """In float64: what the target gains when an MLP writes a little more at one token."""
    tower = Tower(any_clip.model.double().visual)
    try:
        pixels = make_pixels(2, tower.image_size).double()
        u = torch.randn(tower.embedding, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

        def target(residual):
            return F.normalize(tower.head(residual), dim=-1) @ u

        gradients = written_gradients(tower, pixels, target, held=False).gradients
        step = torch.randn(tower.width, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        for layer in range(tower.layers):
            for token in (0, tower.tokens - 1):
                ends = []
                for sign in (1, -1):
                    stream = tower.embed(pixels)
                    for at in range(tower.layers):
                        stream = stream + tower.attention(at, stream)
                        stream = stream + tower.mlp(at, stream)[1]
                        if at == layer:
                            stream = stream.clone()
                            stream[:, token] += sign * 1e-6 * step
                    ends.append(target(stream[:, 0]))
                expected = (ends[0] - ends[1]) / 2e-6
                torch.testing.assert_close(gradients[layer, :, token] @ step, expected, rtol=1e-5, atol=1e-8)
    finally:
        any_clip.model.float()
