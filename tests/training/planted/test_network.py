"""What interventions know of a CLIP and its dictionaries, by what they then do in the running network."""

import numpy as np
import pytest
import torch

from vitrine.models.dictionary.average import mean_code, mean_residual_code
from vitrine.models.dictionary.edited import Edited
from vitrine.models.graph.rerun import RerunGraph
from vitrine.models.interventions.batch import stacked
from vitrine.models.interventions.changes import InterventionError, resolve
from vitrine.models.interventions.spec import Intervention
from vitrine.training.planted.network import TorchNetwork


@pytest.fixture(scope="module")
def images(make_pixels):
    return make_pixels(6, seed=3)


@pytest.fixture(scope="module")
def saes(clip, make_saes):
    return make_saes(clip)


@pytest.fixture(scope="module")
def network(clip, clt, saes, images):
    return TorchNetwork(clip.tower, {"clt": clt, "residual": saes}, [images[:4], images[4:]])


@pytest.fixture(scope="module")
def run(graph, clt, network, images):
    """run(*interventions) -> unit embeddings [6, D]."""
    rerun = RerunGraph(graph, clt, torch.float32).eval()

    @torch.no_grad()
    def changed(*interventions):
        changes = resolve([Intervention(**item) for item in interventions], network, "rerun")
        return rerun(images, *map(torch.from_numpy, stacked([changes] * len(images)).values()))[0]

    return changed


def test_features_at_their_means_agree_with_edited(run, clip, clt, images):
    mean = mean_code(clip.tower, clt, [images])
    features = [(layer, index) for layer in range(3) for index in mean[layer, 0].topk(4).indices.tolist()]
    edited = torch.zeros(1, clt.layers, clt.features, dtype=torch.bool)
    for layer, index in features:
        edited[0, layer, index] = True
    residual = Edited(clip.tower, clt, mean)(clip.tower.embed(images), edited.expand(len(images), -1, -1))
    expected = torch.nn.functional.normalize(clip.tower.head(residual), dim=-1)
    found = run(*({"op": "ablate", "layer": layer, "index": index, "to": "mean"} for layer, index in features))
    change = (expected - run()).abs().max()
    assert change > 1e-3
    assert (found - expected).abs().max() < 0.01 * change, "but for decoders in 8 bits"


def test_a_projection_to_the_mean_holds_to_the_end(run, clip, clt, images, network):
    heads = []
    hook = clip.tower.visual.ln_post.register_forward_hook(lambda module, inputs, output: heads.append(inputs[0]))
    run({"op": "project", "layer": 1, "index": 4, "to": "mean"})
    hook.remove()
    written = sum(decoder.weights[1][4] for decoder in clt.decoders[1:])
    expected = (clip.tower(images).residual_out[:, 0] @ written).mean()
    torch.testing.assert_close(heads[0] @ written, expected.expand(len(images)), rtol=1e-3, atol=1e-3)


def test_what_saes_read_write_and_do_on_average(clip, saes, images, network):
    means = mean_residual_code(clip.tower, saes, [images])
    np.testing.assert_allclose(network.means("residual", 1, 7), means[1, :, 7].numpy(), rtol=1e-4, atol=1e-6)
    assert (network.direction("residual", 1, 7, "encoder") == saes.encoders[1].weight[7].numpy()).all()
    assert (network.direction("residual", 1, 7, "decoder") == saes.decoders[1].weight[7].numpy()).all()
    assert [network.features("residual", layer) for layer in range(3)] == [*saes.architecture.features, 0]


def test_a_dictionary_that_is_not_there_has_no_features(clip, clt, images):
    network = TorchNetwork(clip.tower, {"clt": clt}, [images])
    item = Intervention(op="ablate", layer=0, index=1, dictionary="residual")
    with pytest.raises(InterventionError, match="layer 0 of residual has no features"):
        resolve([item], network, "rerun")
