"""Interventions in the running network, against a plain float64 loop over the tower, one change at a time."""

from copy import deepcopy
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch

from vitrine.models.account.ledger import Decomposition, ledger
from vitrine.models.bundle.layout import ALWAYS, EVERY_OUTPUT
from vitrine.models.dictionary.average import mean_code
from vitrine.models.dictionary.edited import Edited
from vitrine.models.graph.attribution import AttributionGraph
from vitrine.models.graph.replacement import Int8Decoder
from vitrine.models.graph.rerun import Changed, RerunGraph
from vitrine.models.interventions.batch import stacked
from vitrine.models.interventions.changes import resolve
from vitrine.models.interventions.spec import Intervention


class Known:
    """What `resolve` has to know, made up."""

    def __init__(self, tower, clt, heads=4):
        self.layers, self.tokens, self.heads, self.width = tower.layers, tower.tokens, heads, tower.width
        self.clt = clt

    def features(self, dictionary, layer):
        return self.clt.features

    def means(self, dictionary, layer, index):
        return np.array([0.3 + 0.01 * index, -0.2 * layer - 0.1], np.float32)

    def direction(self, dictionary, layer, index, kind):
        rows = self.clt.encoders[layer].weight if kind == "encoder" else self.clt.directions()[layer]
        return rows[index].numpy()

    def mean_stream(self, at):
        return np.random.default_rng(at).normal(size=(2, self.width)).astype(np.float32)


def in_bytes(clt):
    """The CLT with decoders that 8 bits hold exactly."""
    clt = deepcopy(clt)
    for decoder in clt.decoders:
        for weight in decoder.weights:
            stored = Int8Decoder(weight)
            weight.copy_(stored.rows.float() * stored.scales[:, None])
    return clt


@pytest.fixture(scope="module")
def rerun_of():
    """rerun_of(tower, clt) -> (RerunGraph, vision graph), of a CLT that is `in_bytes`."""

    def make(tower, clt):
        vision = AttributionGraph(tower, clt, torch.zeros(clt.layers, clt.width), torch.float32).eval()
        return RerunGraph(vision, clt, torch.float32).eval(), vision

    return make


def run(graph, pixels, changes):
    feeds = (torch.from_numpy(np.ascontiguousarray(part)) for part in stacked(changes).values())
    with torch.no_grad():
        outputs = graph(pixels, *feeds)
    named = dict(zip(ALWAYS, map(np.asarray, outputs), strict=True))
    return [Decomposition.from_batch(named, image) for image in range(len(pixels))]


def dense(code, features):
    return torch.zeros(len(code.indices), features, dtype=code.values.dtype).scatter_add(1, code.indices, code.values)


@torch.no_grad()
def by_hand(tower, clt, pixels, changes):
    """[CLS] before ln_post [d] of one image [1, 3, H, W], in float64: every change where it happens, token by token."""
    tower, clt = deepcopy(tower).double(), deepcopy(clt).double()
    is_cls, differences = torch.arange(tower.tokens) == 0, []

    def projected(stream, place):
        stream = stream.clone()
        for m in np.flatnonzero(changes.places == place):
            u = torch.from_numpy(changes.directions[m]).double()
            for t in range(tower.tokens):
                length = changes.direction_gains[m, t] * (stream[0, t] @ u) + changes.direction_offsets[m, t]
                stream[0, t] += float(length) * u if changes.direction_gains[m, t] else 0
        return stream

    stream = tower.embed(pixels.double())
    for layer, block in enumerate(tower.blocks):
        stream = projected(stream, layer)
        attn, normed = block.attn, block.ln_1(stream)[0]
        q, k, v = (normed @ attn.in_proj_weight.T + attn.in_proj_bias).chunk(3, -1)
        out = attn.out_proj.bias.expand(tower.tokens, -1).clone()
        for h in range(attn.num_heads):
            own = slice(h * attn.head_dim, (h + 1) * attn.head_dim)
            weights = (q[:, own] @ k[:, own].T / attn.head_dim**0.5).softmax(-1)
            factor = torch.from_numpy(changes.heads[layer, h]).double()[:, None]
            out += factor * (weights @ v[:, own] @ attn.out_proj.weight[:, own].T)
        stream = stream + block.ls_1(out) * torch.from_numpy(changes.attention[layer]).double()[:, None]
        mlp_in, mlp_out = tower.mlp(layer, stream)
        z, changed = dense(clt.encoders[layer](mlp_in[0], is_cls), clt.features), None
        changed = z.clone()
        for n in np.flatnonzero(changes.layers == layer):
            for t in range(tower.tokens):
                changed[t, changes.indices[n]] += changes.gains[n, t] * z[t, changes.indices[n]] + changes.offsets[n, t]
        differences.append(changed - z)
        stream = stream + mlp_out * torch.from_numpy(changes.mlp[layer]).double()[:, None]
        for source, weight in zip(clt.decoders[layer].sources, clt.decoders[layer].weights, strict=True):
            stream = stream + differences[source] @ weight
    return projected(stream, tower.layers)[0, 0], tower


def feature(op, layer, index, **more):
    return {"op": op, "layer": layer, "index": index} | more


# An index is a rank here: see `changes_of`.
OF_EACH_KIND = {
    "ablate": [feature("ablate", 0, 3), feature("ablate", 1, 5, tokens="cls")],
    "to mean": [feature("ablate", 1, 1, to="mean", tokens="patches")],
    "scale": [feature("scale", 0, 9, value=3.0), feature("scale", 2, 9, value=-1)],
    "set": [feature("set", 0, 11, value=2.0, tokens=(0, 4)), feature("set", 2, 1, value=1)],
    "project": [feature("project", 0, 2), feature("project", 1, 2, direction="encoder")],
    "heads": [
        {"op": "ablate", "layer": 0, "head": 1, "tokens": "all"},
        {"op": "scale", "layer": 2, "head": 3, "value": 2.0},
    ],
    "rows": [
        {"op": "ablate", "layer": 1, "row": "attention"},
        {"op": "scale", "layer": 0, "row": "mlp", "value": 0.5, "tokens": "patches"},
    ],
}
EVERYTHING = list(chain.from_iterable(OF_EACH_KIND.values()))
ALONE = {
    "vectors": [
        {"op": "project", "layer": 1, "vector": (1.0, -2.0) + (0.5,) * 30, "value": 1.5, "tokens": (0, 3)},
        {"op": "project", "layer": 2, "vector": (1.0,) * 32, "to": "mean", "tokens": "cls"},
        feature("project", 1, 2, tokens="all"),
    ],
    "project to mean": [feature("project", 0, 2, to="mean", tokens="patches")],
    "a whole row of features": [{"op": "ablate", "layer": 1, "row": "clt", "tokens": "all"}],
}


@torch.no_grad()
def changes_of(items, tower, clt, pixels):
    """`items` as changes; an index is a rank: 0 is the layer's most active feature in this image."""
    codes = clt.encode(tower(pixels).mlp_in[:, 0], torch.arange(tower.tokens) == 0)
    ranks = [dense(code, clt.features).abs().sum(0).argsort(descending=True).tolist() for code in codes]
    named = [item | {"index": ranks[item["layer"]][item["index"]]} if "index" in item else item for item in items]
    return resolve([Intervention(**item) for item in named], Known(tower, clt), "rerun")


@torch.no_grad()
def check_by_hand(graph, tower, clt, pixels, changes):
    """The graph's decompositions, each checked against the residual by hand."""
    found = run(graph, pixels, changes)
    for image, (parts, of_image) in enumerate(zip(found, changes, strict=True)):
        residual, exact = by_hand(tower, clt, pixels[image : image + 1], of_image)
        components = torch.from_numpy(parts.components).double()
        assert len(components) == 2 * tower.layers + 4
        torch.testing.assert_close(components.sum(0), residual, rtol=0, atol=1e-5 * float(components.abs().max()))
        z = exact.head(residual)
        torch.testing.assert_close(torch.from_numpy(parts.embedding).double(), z / z.norm(), rtol=0, atol=1e-5)
        account = ledger(parts, np.eye(len(parts.embedding))[0], 100.0)
        assert abs(account.remainder) < 1e-3
        assert account.edit == pytest.approx(100 * parts.rows[-1, 0])
    return found


@pytest.mark.parametrize("name", [*OF_EACH_KIND, *ALONE])
def test_every_change(clip, clt, rerun_of, make_pixels, name):
    clt, pixels = in_bytes(clt), make_pixels(1, seed=4)
    graph, vision = rerun_of(clip.tower, clt)
    changes = changes_of((OF_EACH_KIND | ALONE)[name], clip.tower, clt, pixels)
    (parts,) = check_by_hand(graph, clip.tower, clt, pixels, [changes])
    with torch.no_grad():
        own = vision(pixels)[0][0].numpy()
    assert np.abs(parts.embedding - own).max() > 3e-4  # it does something


def test_towers_of_every_kind(any_clip, make_clt, rerun_of, make_pixels):
    """Everything at once, different in each image of a batch."""
    tower = any_clip.tower
    clt, pixels = in_bytes(make_clt(any_clip)), make_pixels(2, tower.image_size, seed=5)
    graph, _ = rerun_of(tower, clt)
    changes = changes_of(EVERYTHING, tower, clt, pixels[:1])
    other = replace(changes, gains=changes.gains / 2, offsets=-changes.offsets, heads=changes.heads * 0.9)
    first, second = check_by_hand(graph, tower, clt, pixels, [changes, other])
    assert np.abs(first.embedding - second.embedding).max() > 1e-3


def test_dictionaries_of_every_kind(clip, any_clt, rerun_of, make_pixels):
    clt, pixels = in_bytes(any_clt), make_pixels(1, seed=4)
    graph, _ = rerun_of(clip.tower, clt)
    changes = changes_of(EVERYTHING, clip.tower, clt, pixels)
    (parts,) = check_by_hand(graph, clip.tower, clt, pixels, [changes])
    # The code that is listed is the changed one: it makes the clt rows, and a changed feature is there once.
    directions = clt.directions().numpy()
    for layer in range(clt.layers):
        row = parts.feature_values[layer] @ directions[layer, parts.feature_indices[layer]]
        np.testing.assert_allclose(parts.components[parts.clt_row(layer)], row, atol=1e-4)
    assert np.abs(parts.projection).sum() > 0
    for layer, index in zip(changes.layers, changes.indices, strict=True):
        assert np.count_nonzero(parts.feature_values[layer][parts.feature_indices[layer] == index]) <= 1


def test_no_change_is_the_vision_graph(clip, any_clt, rerun_of, make_pixels):
    """Also of features that are named: a gain of 0."""
    pixels = make_pixels(2, seed=6)
    graph, vision = rerun_of(clip.tower, any_clt)
    nothing = changes_of([{"op": "scale", "layer": 1, "index": 0, "value": 1.0}], clip.tower, any_clt, pixels[:1])
    with torch.no_grad():
        expected = dict(zip(EVERY_OUTPUT, map(np.asarray, vision(pixels)), strict=True))
    for image, parts in enumerate(run(graph, pixels, [nothing] * 2)):
        own = Decomposition.from_batch(expected, image)
        np.testing.assert_allclose(parts.rows[:-1], own.rows, atol=1e-5)
        np.testing.assert_allclose(parts.rows[-1], 0, atol=1e-7)
        np.testing.assert_allclose(parts.embedding, own.embedding, atol=1e-5)
        np.testing.assert_allclose(parts.sigma_without[:-1], own.sigma_without, rtol=1e-5)
        np.testing.assert_allclose(parts.projection, own.projection, atol=1e-4)
        for layer in range(clip.tower.layers):
            found, expected_code = (
                {int(f): z for f, z in zip(of.feature_indices[layer], of.feature_values[layer], strict=True) if z}
                for of in (parts, own)
            )
            assert found == pytest.approx(expected_code, abs=1e-4)


def test_features_at_their_means_as_the_evaluation_has_it(clip, clt, rerun_of, make_pixels):
    """`models.dictionary.edited`, which sets them in training's evaluations."""
    clt, pixels = in_bytes(clt), make_pixels(1, seed=4)
    mean = mean_code(clip.tower, clt, [make_pixels(4, seed=9)])
    edited = torch.rand(1, clt.layers, clt.features, generator=torch.Generator().manual_seed(3)) < 0.3
    layers, indices = (part.numpy() for part in edited[0].nonzero(as_tuple=True))
    nothing = changes_of([], clip.tower, clt, pixels)
    types = np.minimum(np.arange(clip.tower.tokens), 1)
    changes = replace(
        nothing,
        layers=layers,
        indices=indices,
        gains=-np.ones((len(layers), len(types)), np.float32),
        offsets=mean.numpy()[layers[:, None], types, indices[:, None]],
    )
    graph, _ = rerun_of(clip.tower, clt)
    (parts,) = run(graph, pixels, [changes])
    expected = Edited(clip.tower, clt, mean)(clip.tower.embed(pixels), edited)[0]
    np.testing.assert_allclose(parts.components.sum(0), expected, rtol=1e-4, atol=1e-4)


def test_a_projection_leaves_nothing_along_its_directions(clip, clt, make_pixels):
    """After each of its places, at the tokens that it is made at."""
    tower, pixels = clip.tower, make_pixels(2, seed=4)
    items = [{"op": "project", "layer": 0, "index": n, "tokens": "patches"} for n in range(3)]
    changes = changes_of(items, tower, clt, pixels[:1])
    changed = Changed(*map(torch.from_numpy, stacked([changes, changes]).values()))
    stream = tower(pixels).residual_in
    for place in (1, 2, 3):
        directions = torch.from_numpy(changes.directions[changes.places == place])
        assert len(directions) == 3
        after = stream + changed.along_directions(stream, place)
        torch.testing.assert_close((after @ directions.T)[:, 1:], torch.zeros(2, 16, 3), atol=1e-5, rtol=0)
        assert torch.equal(after[:, 0], stream[:, 0])
    assert not changed.along_directions(stream, 0).any()


def test_heads_and_the_outputs_bias_are_what_attention_writes(any_clip, make_clt, rerun_of, make_pixels):
    tower = any_clip.tower
    _, vision = rerun_of(tower, make_clt(any_clip))
    with torch.no_grad():
        outputs = dict(zip(EVERY_OUTPUT, vision(make_pixels(2, tower.image_size)), strict=True))
        for layer, block in enumerate(tower.blocks):
            whole = outputs["head_components"][:, layer].sum(1) + block.ls_1(block.attn.out_proj.bias[None])
            torch.testing.assert_close(whole, outputs["components"][:, 1 + layer], rtol=1e-4, atol=1e-5)
