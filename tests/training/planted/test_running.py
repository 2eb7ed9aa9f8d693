"""The changed running network against the one that sets features to their means, and against nothing changed."""

import numpy as np
import pytest
import torch

from vitrine.models.dictionary.average import mean_code
from vitrine.models.dictionary.edited import Edited
from vitrine.models.interventions.changes import InterventionError, resolve
from vitrine.models.interventions.spec import Intervention
from vitrine.training.planted.network import TorchNetwork
from vitrine.training.planted.running import Running


@pytest.fixture(scope="module")
def images(make_pixels):
    return make_pixels(6, seed=3)


@pytest.fixture(scope="module")
def network(clip, clt, make_saes, images):
    return TorchNetwork(clip.tower, {"clt": clt, "residual": make_saes(clip)}, [images[:4], images[4:]])


@pytest.fixture(scope="module")
def run(clip, network, images):
    """run(*interventions) -> unit embeddings [6, D]."""

    def changed(*interventions):
        changes = resolve([Intervention(**item) for item in interventions], network, "rerun")
        return Running(clip.tower, network.dictionaries[changes.dictionary], changes)(images)

    return changed


@torch.no_grad()
def test_no_change_changes_nothing(run, clip, images):
    torch.testing.assert_close(run(), clip.model.encode_image(images, normalize=True), rtol=1e-5, atol=1e-6)
    same = run({"op": "scale", "layer": 0, "index": 3, "dictionary": "residual", "value": 1})
    torch.testing.assert_close(same, run(), rtol=1e-5, atol=1e-6)


def test_features_at_their_means_agree_with_edited(run, clip, clt, images, network):
    features = [(0, 3), (0, 5), (1, 7), (2, 2)]
    mean = mean_code(clip.tower, clt, [images])
    np.testing.assert_allclose(network.means("clt", 1, 7), mean[1, :, 7].numpy(), rtol=1e-4, atol=1e-6)
    edited = torch.zeros(1, clt.layers, clt.features, dtype=torch.bool)
    for layer, index in features:
        edited[0, layer, index] = True
    residual = Edited(clip.tower, clt, mean)(clip.tower.embed(images), edited.expand(len(images), -1, -1))
    expected = torch.nn.functional.normalize(clip.tower.head(residual), dim=-1)
    found = run(*({"op": "ablate", "layer": layer, "index": index, "to": "mean"} for layer, index in features))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - run()).abs().max() > 1e-4


@torch.no_grad()
def test_a_residual_feature_is_taken_out_of_the_stream(run, clip, network, images):
    """Of the last SAE: the block after it, by hand."""
    saes, tower = network.dictionaries["residual"], clip.tower
    layer = saes.layers - 1
    taps = tower(images)
    stream = taps.residual_in + (taps.attn_out + taps.mlp_out)[: layer + 1].sum(0)
    scale = stream.std(-1, keepdim=True) + 1e-5
    read = ((stream - stream.mean(-1, keepdim=True)) / scale).flatten(0, 1)
    code = saes.encoders[layer](read, torch.arange(len(read)) % tower.tokens == 0)
    index = int(code.indices[code.values.argmax(0)[0], 0])
    z = torch.where(code.indices == index, code.values, 0).sum(1).view(*stream.shape[:2], 1)
    stream = stream - scale * z * saes.decoders[layer].weight[index]
    stream = stream + tower.attention(layer + 1, stream)
    stream = stream + tower.mlp(layer + 1, stream)[1]
    expected = torch.nn.functional.normalize(tower.head(stream[:, 0]), dim=-1)
    found = run({"op": "ablate", "layer": layer, "index": index, "dictionary": "residual"})
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_projection_holds_to_the_end(clip, network, images):
    changes = resolve([Intervention(op="project", layer=1, index=4)], network, "rerun")
    running = Running(clip.tower, network.dictionaries["clt"], changes)
    heads = []
    hook = clip.tower.visual.ln_post.register_forward_hook(lambda module, inputs, output: heads.append(inputs[0]))
    running(images)
    hook.remove()
    direction = torch.from_numpy(changes.directions[-1])
    assert (heads[0] @ direction).abs().max() < 1e-4 * heads[0].norm(dim=-1).max()


def test_what_is_not_measured_is_refused(clip, network):
    changes = resolve([Intervention(op="ablate", layer=0, head=1)], network, "rerun")
    with pytest.raises(InterventionError, match="heads and rows are not measured"):
        Running(clip.tower, None, changes)
    changes = resolve([Intervention(op="ablate", layer=0, index=1)], network, "rerun")
    with pytest.raises(InterventionError, match="no features of clt"):
        Running(clip.tower, None, changes)
