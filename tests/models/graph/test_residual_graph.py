"""The sources of features of residual SAEs, and of the logit: against autograd in float64, and as ONNX graphs."""

import onnx
import onnxruntime
import pytest
import torch

from libragrad import held_block, in_float64
from vitrine.models.graph.gated_trace import GatedTraceGraph
from vitrine.models.graph.onnx_file import to_onnx
from vitrine.models.graph.residual import FeatureSourcesGraph, LogitSourcesGraph

SPARSIFIERS = ("relu_topk", "abs_topk", "jumprelu", "batch_topk")
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


class Image:
    """One image's trace in float64, as the graphs of each layer take it."""

    def __init__(self, clip, saes, pixels):
        self.tower, self.saes = in_float64(clip), None if saes is None else saes.double()
        self.outputs = GatedTraceGraph(self.tower, self.saes)(pixels[None].double())
        _, self.scale, _, *self.held = (part[0] for part in self.outputs)
        self.streams = self.held[4]

    def through(self, block):
        """The trace as the graph that goes back through this block takes it."""
        below = [part[block - 1] for part in self.held[5:]] if block else []
        return [part[block] for part in self.held[:5]] + below

    def dense(self, layer):
        """(z [T, F], error [T, d]) of an SAE by its own modules."""
        is_cls = torch.arange(self.tower.tokens) == 0
        code, out = self.saes.reconstruct(layer, self.streams[layer + 1], is_cls)
        dense = torch.zeros(self.tower.tokens, len(self.saes.decoders[layer].weight), dtype=torch.float64)
        return dense.scatter_add(1, code.indices, code.values), self.streams[layer + 1] - out

    def check(self, found, n, target, stream, block):
        """found: outputs of a graph; target: a scalar made from `stream`, the leaf before that block."""
        (gradient,) = torch.autograd.grad(target, stream)
        *parts, constants = (part[n] for part in found)
        if block == 0:
            torch.testing.assert_close(parts[0], (gradient * stream).sum(-1).detach(), **CLOSE)
        else:
            features, errors, biases = parts
            decoder, scales = self.saes.decoders[block - 1], self.held[5][block - 1]
            dense, error = self.dense(block - 1)
            expected = dense * scales[:, None] * (gradient @ decoder.weight.T)
            ours = torch.zeros_like(expected).scatter_add(1, self.held[6][block - 1], features)
            torch.testing.assert_close(ours, expected, **CLOSE)
            torch.testing.assert_close(errors, (error * gradient).sum(-1), **CLOSE)
            torch.testing.assert_close(biases, (scales * (gradient @ decoder.bias)).sum(), **CLOSE)
        total = sum(part.sum() for part in parts) + constants
        torch.testing.assert_close(total, target.detach(), **CLOSE)


def check(clip, saes, pixels):
    image = Image(clip, saes, pixels)
    tower, tokens = image.tower, image.tower.tokens
    for block in range(tower.layers):
        stream = image.streams[block].detach().requires_grad_()
        after = held_block(tower.blocks[block], stream)
        if block == tower.layers - 1:
            directions = torch.randn(2, tower.width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
            directions -= directions.mean(-1, keepdim=True)  # as of a logit: the mean over channels is read by nothing
            found = LogitSourcesGraph(tower, image.saes)(directions, *image.through(block))
            for n, direction in enumerate(directions):
                image.check(found, n, direction @ held_block(tower.blocks[block], stream)[0], stream, block)
            continue
        scales, indices, values = (part[block] for part in image.held[5:])
        token = torch.tensor([0, tokens - 1, 3])
        place = values[token].abs().argmax(-1)
        feature = indices[token, place]
        found = FeatureSourcesGraph(tower, image.saes, block)(feature, token, scales, *image.through(block))
        encoder = image.saes.encoders[block]
        for n, (f, t) in enumerate(zip(feature, token, strict=True)):
            after = held_block(tower.blocks[block], stream)
            x = (after[t] - after[t].mean()) / (after[t].std().detach() + 1e-5)
            target = encoder.weight[f] @ x + encoder.bias[f]
            torch.testing.assert_close(target.detach(), values[t, place[n]], **CLOSE)
            image.check(found, n, target, stream, block)


def test_sources_in_any_tower(any_clip, make_saes, make_pixels):
    check(any_clip, make_saes(any_clip, k_cls=5), make_pixels(1, any_clip.tower.image_size, seed=3)[0])


@pytest.mark.parametrize("sparsifier", SPARSIFIERS)
def test_sources_by_any_sparsifier(clip, make_saes, make_pixels, sparsifier):
    check(clip, make_saes(clip, sparsifier=sparsifier, k_cls=12), make_pixels(1, seed=4)[0])


@pytest.mark.parametrize("with_saes", [True, False])
def test_the_logit_of_one_layer_has_embeddings_alone(make_clip, make_saes, make_pixels, with_saes):
    clip = make_clip(vision_cfg={"layers": 1})
    check(clip, make_saes(clip) if with_saes else None, make_pixels(1, seed=5)[0])


def test_the_onnx_graphs(clip, make_saes, make_pixels, tmp_path):
    """Any number of directions, by ONNX Runtime as by torch."""
    saes, tower, pixels = make_saes(clip), clip.tower, make_pixels(2, seed=6)
    trace = GatedTraceGraph(tower, saes).eval()
    check_onnx(trace, {"pixels": pixels}, tmp_path / "trace.onnx", "pixels")
    *held, scales, indices, values = (part[0] for part in trace(pixels)[3:])
    below = {f"held_{place}": part[1] for place, part in enumerate(held)}
    below |= {"deviations": scales[0], "indices": indices[0], "values": values[0]}
    for count in (2, 3):
        start = {"feature": indices[1, :count, 0], "token": torch.arange(count), "scales": scales[1]}
        graph = FeatureSourcesGraph(tower, saes, 1).eval()
        check_onnx(graph, start | below, tmp_path / "feature.onnx", "feature", "token")


def check_onnx(graph, inputs, path, *dynamic):
    """The graph is exported at the first call."""
    with torch.no_grad():
        expected = graph(*inputs.values())
    names = [f"output_{place}" for place in range(len(expected))]
    if not path.exists():
        axis = {0: torch.export.Dim("n")}
        onnx.save_model(to_onnx(graph, inputs, names, dynamic=dict.fromkeys(dynamic, axis)), path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    found = session.run(names, {name: value.numpy() for name, value in inputs.items()})
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=1e-4, atol=1e-4)
