"""Attention scores and their accounts against autograd in float64, and by hand; pairs by the bilinear form itself."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_sources_graph import Reference, by_feature

from common import with_stored_decoders
from libragrad import held_norm
from vitrine.models.account.attention_score import AttentionScore, feature_parts, largest, pairs
from vitrine.models.account.sources import Trace
from vitrine.models.bundle.layout import SCORES_OUTPUTS, SOURCES_OUTPUTS, TRACE_OUTPUTS
from vitrine.models.graph.scores import ScoresGraph
from vitrine.models.graph.sources import SourcesGraph
from vitrine.models.graph.trace import TraceGraph


class ScoreReference(Reference):
    """The same network in float64, stopped at the queries and keys of one head."""

    def queries_keys(self, layer, head):
        """[T, d / H] each, differentiable by what was written before block `layer`."""
        stream = self.embedded if layer == 0 else self.before_mlp[layer - 1] + self.written[layer - 1]
        block = self.tower.blocks[layer]
        normed = held_norm(stream, block.ln_1)
        q, k, _ = F.linear(normed, block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, -1)
        width = block.attn.head_dim
        return q[:, head * width : (head + 1) * width], k[:, head * width : (head + 1) * width]


def explain(clip, clt, pixels, layer, head, query, key, relative):
    """(trace, the score, the query's account, the key's, the outputs of sources.onnx for the query's rows, and for
    the parts of a query) by the graphs in torch."""
    names = TRACE_OUTPUTS if clt else TRACE_OUTPUTS[:-2]
    held = [part[0] for part in TraceGraph(clip.tower, clt, torch.float32)(pixels[None])]
    trace = Trace.from_batch({name: part.numpy()[None] for name, part in zip(names, held, strict=True)}, 0)
    weights, before_attention, before_mlp, embedded, written = held[3:8]
    at = torch.tensor([layer]), torch.tensor([head])
    outputs = ScoresGraph(clip.tower)(*at, weights, before_attention, embedded, written)
    outputs = dict(zip(SCORES_OUTPUTS, (part.numpy() for part in outputs), strict=True))
    score = AttentionScore.of(trace, outputs, layer, head, query, key, relative)
    graph = SourcesGraph(clip.tower, clt, torch.float32)
    code = held[8:] if clt else []

    def follow(starts):
        count = len(starts.directions)
        start = [torch.from_numpy(starts.directions).float()]
        start += [torch.full((count,), number) for number in (layer, starts.token, -1)]
        found = graph(*start, weights, before_attention, before_mlp, embedded, written, *code)
        return dict(zip(SOURCES_OUTPUTS, (part.numpy() for part in found), strict=False))

    return SimpleNamespace(
        trace=trace,
        score=score,
        follow=follow,
        of_query=score.query_account(trace, follow(score.query_start())),
        of_key=score.key_account(trace, follow(score.key_start())),
    )


def compare(account, expected, reference, features):
    embeddings, errors, parts, biases, _ = expected
    close = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(account.embeddings, embeddings, **close)
    np.testing.assert_allclose(account.errors, errors, **close)
    np.testing.assert_allclose(account.biases, biases, **close)
    for source, code in enumerate(reference.codes):
        ours = torch.from_numpy(account.features[source]).double()
        ours = by_feature(torch.from_numpy(account.indices[source]), ours, features)
        torch.testing.assert_close(ours, by_feature(code.indices, parts[source], features), **close)


def check(clip, clt, pixels, layer, head, query, key):
    reference = ScoreReference(clip, with_stored_decoders(clt), pixels)
    queries, keys = reference.queries_keys(layer, head)
    scale = queries.shape[-1] ** -0.5
    for relative in (False, True):
        found = explain(clip, clt, pixels, layer, head, query, key, relative)
        whole = keys[key] - keys.mean(0) if relative else keys[key]
        total = float((queries[query] @ whole * scale).detach())
        assert found.score.total == pytest.approx(total, abs=1e-4)
        np.testing.assert_allclose(found.score.scores, (keys @ queries[query] * scale).detach(), atol=1e-4)
        assert found.score.weight == pytest.approx(
            float((keys @ queries[query] * scale).detach().softmax(0)[key]), abs=1e-5
        )
        for account, scalar in (
            (found.of_query, queries[query] @ whole.detach() * scale),
            (found.of_key, queries[query].detach() @ whole * scale),
        ):
            assert account.logit == found.score.total
            assert abs(account.remainder) < 1e-4
            compare(account, reference.account(scalar), reference, clt.features)
            assert not account.features[layer:].any()
            assert not account.errors[layer:].any()


@pytest.mark.parametrize("place", [(0, 0, 0, 3), (1, 1, 4, 0), (2, 0, 0, 16)])
def test_scores_of_any_layer_head_and_tokens(clip, make_clt, make_pixels, place):
    check(clip, make_clt(clip, k=8, k_cls=12), make_pixels(1, seed=3)[0], *place)


def test_scores_of_any_clip(any_clip, make_clt, make_pixels):
    pixels = make_pixels(1, any_clip.tower.image_size, seed=3)[0]
    check(any_clip, make_clt(any_clip, k=8, k_cls=12), pixels, 2, 1, 0, any_clip.tower.tokens - 1)


def test_scores_of_a_tower_of_one_layer(make_clip, make_clt, make_pixels):
    clip = make_clip(vision_cfg={"layers": 1})
    check(clip, make_clt(clip), make_pixels(1, seed=5)[0], 0, 1, 0, 5)


@pytest.mark.parametrize("sparsifier", ["relu_topk", "abs_topk", "jumprelu", "batch_topk"])
@pytest.mark.parametrize("cross_layer", [True, False])
def test_scores_of_any_clt(clip, make_clt, make_pixels, sparsifier, cross_layer):
    clt = make_clt(clip, k=(4, 8, 6), sparsifier=sparsifier, cross_layer=cross_layer)
    check(clip, clt, make_pixels(1, seed=4)[0], 2, 1, 0, 7)


@pytest.mark.parametrize("relative", [False, True])
def test_without_a_clt_the_mlps_are_the_parts(clip, make_clt, make_pixels, relative):
    pixels = make_pixels(1, seed=3)[0]
    reference = ScoreReference(clip, with_stored_decoders(make_clt(clip)), pixels)
    queries, keys = reference.queries_keys(2, 1)
    found = explain(clip, None, pixels, 2, 1, 0, None, relative)
    key = found.score.key
    assert key == int((keys @ queries[0]).argmax())
    whole = keys[key] - keys.mean(0) if relative else keys[key]
    for account, scalar in (
        (found.of_query, queries[0] @ whole.detach()),
        (found.of_key, queries[0].detach() @ whole),
    ):
        grads = torch.autograd.grad(scalar * queries.shape[-1] ** -0.5, reference.written[:2], retain_graph=True)
        for layer, gradient in enumerate(grads):
            expected = (reference.written[layer] * gradient).sum(-1).detach()
            np.testing.assert_allclose(account.errors[layer], expected, rtol=1e-4, atol=1e-5)
        assert abs(account.remainder) < 1e-4
        assert account.features.size == 0


@pytest.mark.parametrize("relative", [False, True])
def test_pairs_are_the_products_of_what_features_add_to_query_and_key(clip, clt, make_pixels, relative):
    layer, head, query, key = 2, 1, 0, 7
    pixels = make_pixels(1, seed=6)[0]
    found = explain(clip, clt, pixels, layer, head, query, key, relative)
    layers, indices, contributions = (part[:5].tolist() for part in found.of_query.by_feature())
    chosen = list(zip(layers, indices, strict=True))
    parts = feature_parts(found.trace, found.follow(found.score.query_row_starts()), chosen)
    outputs = found.follow(found.score.key_starts(parts))
    listed = pairs(found.trace, outputs, chosen, 10_000)

    reference = ScoreReference(clip, with_stored_decoders(clt), pixels)
    queries, keys = reference.queries_keys(layer, head)
    whole = keys[key] - keys.mean(0) if relative else keys[key]

    def vectors(vector):
        """[L, F, d / H]: what each feature adds to a vector, over all tokens."""
        columns = []
        for component in vector:
            _, _, features, _, _ = reference.account(component)
            summed = [
                by_feature(code.indices, part, clt.features).sum(0)
                for code, part in zip(reference.codes, features, strict=True)
            ]
            columns.append(torch.stack(summed))
        return torch.stack(columns, dim=-1)

    of_query, of_key = vectors(queries[query]), vectors(whole)
    expected = torch.einsum("lfw,mgw->lfmg", of_query, of_key) * queries.shape[-1] ** -0.5
    for pair in listed:
        assert pair.contribution == pytest.approx(float(expected[(*pair.query, *pair.key)]), abs=1e-5)
    assert len(listed) == sum(int((expected[place].abs() > 0).sum()) for place in chosen)
    top = largest(listed, 3)
    assert [abs(pair.contribution) for pair in top] == sorted((abs(p.contribution) for p in listed), reverse=True)[:3]
    # All pairs of a query feature, those with what is no feature included, are its part of the query's account.
    for row, contribution in enumerate(contributions):
        totals = sum(outputs[name][row].sum() for name in ("embeddings", "errors", "constants", "features", "biases"))
        own = 0 if relative else found.score.biases[1] @ parts[row] * found.score.keys.shape[-1] ** -0.5
        assert totals + own == pytest.approx(contribution, abs=1e-4)


def test_a_score_by_hand():
    """Two channels a head, three tokens."""
    score = AttentionScore(
        query=0,
        key=2,
        relative=False,
        weights=np.array([0.2, 0.3, 0.5]),
        queries=np.array([[1.0, 2.0], [9.0, 9.0], [9.0, 9.0]]),
        keys=np.array([[0.0, 1.0], [3.0, 0.0], [3.0, 2.0]]),
        rows=np.array([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], [[0.0, 0.0, 1.0], [2.0, 0.0, 0.0]]]),
        biases=np.zeros((2, 2)),
    )
    root = 2**-0.5
    np.testing.assert_allclose(score.scores, np.array([2, 3, 7]) * root)
    assert score.total == pytest.approx(7 * root)
    assert score.weight == 0.5
    np.testing.assert_allclose(score.query_start().directions, [np.array([3, 2, 0]) * root])
    np.testing.assert_allclose(score.key_start().directions, [np.array([4, 0, 1]) * root])
    assert (score.query_start().token, score.key_start().token) == (0, 2)
    relative = AttentionScore(**{**vars(score), "relative": True})
    assert relative.total == pytest.approx((7 - 4) * root)  # the mean key is (2, 1)
    np.testing.assert_allclose(relative.query_start().directions, [np.array([1, 1, 0]) * root])
    assert relative.key_start().token == 2 + 3
