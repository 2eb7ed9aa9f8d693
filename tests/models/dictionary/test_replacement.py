"""The replacement model, against an explicit loop over images and tokens in float64."""

import copy

import pytest
import torch

from vitrine.models.clip.tower import Tower
from vitrine.models.dictionary.replacement import Replacement

WINDOWS = [range(0, 3), range(1, 3), range(2, 3), range(0, 1), range(1, 2)]
KINDS = ["relu_topk", "abs_topk", "jumprelu", "batch_topk"]


def code_of(encoder, kind, x, k):
    """One token's code [F], all features at once."""
    a = encoder.weight.double() @ x + encoder.bias.double()
    if kind == "jumprelu":
        return a * (a > encoder.sparsifier.log_threshold.exp())
    if kind == "batch_topk":
        return a * (a >= encoder.sparsifier.thresholds[0])
    size = a.abs() if kind == "abs_topk" else a
    kept = torch.zeros_like(a)
    kept[size.argsort(descending=True)[:k]] = 1
    return a * kept if kind == "abs_topk" else a.relu() * kept


@torch.no_grad()
def naive_replacement(tower, clt, pixels, window, replaced):
    """By the definition: (stream [B, T, d], MLP inputs, MLP outputs). replaced(token): whether it is replaced."""
    tower = Tower(copy.deepcopy(tower.visual).double())
    kind, streams, reads, writes = clt.architecture.sparsifier, [], [], []
    for image in pixels.double():
        stream = tower.embed(image[None])
        codes, read, written = [], [], []
        for layer in range(tower.layers):
            stream = stream + tower.attention(layer, stream)
            block = tower.blocks[layer]
            x = block.ln_2(stream)[0]
            codes.append(
                torch.stack(
                    [
                        code_of(
                            clt.encoders[layer],
                            kind,
                            token,
                            (clt.architecture.k_cls if t == 0 else clt.architecture.k)[layer],
                        )
                        for t, token in enumerate(x)
                    ]
                )
            )
            out = block.ls_2(block.mlp(x))
            if layer in window:
                for token in range(len(x)):
                    if replaced(token):
                        decoder = clt.decoders[layer]
                        out[token] = decoder.bias.double()
                        for source, weight in zip(decoder.sources, decoder.weights, strict=True):
                            out[token] += codes[source][token] @ weight.double()
            stream = stream + out
            read.append(x)
            written.append(out)
        streams.append(stream[0])
        reads.append(torch.stack(read))
        writes.append(torch.stack(written))
    return torch.stack(streams), torch.stack(reads, dim=1), torch.stack(writes, dim=1)


CHOICES = {"all": lambda token: True, "cls": lambda token: token == 0, "patches": lambda token: token > 0}


@pytest.mark.parametrize("tokens", CHOICES)
@pytest.mark.parametrize("window", WINDOWS)
def test_every_window_and_token_choice(clip, make_clt, make_pixels, window, tokens):
    clt, pixels = make_clt(clip, k=8, k_cls=5), make_pixels(2)
    outputs = Replacement(clip.tower, clt)(pixels, window, tokens)
    residual, mlp_in, mlp_out = naive_replacement(clip.tower, clt, pixels, window, CHOICES[tokens])
    torch.testing.assert_close(outputs.residual.double(), residual, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs.mlp_in.double(), mlp_in, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs.mlp_out.double(), mlp_out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cross_layer", [True, False])
@pytest.mark.parametrize("sparsifier", KINDS)
def test_every_kind_of_clt(clip, make_clt, make_pixels, sparsifier, cross_layer):
    clt, pixels = make_clt(clip, k=32, sparsifier=sparsifier, cross_layer=cross_layer), make_pixels(2)
    for encoder in clt.encoders:
        if sparsifier == "batch_topk":
            encoder.sparsifier.thresholds.fill_(0.5)
    outputs = Replacement(clip.tower, clt)(pixels, range(1, 3))
    residual, _, _ = naive_replacement(clip.tower, clt, pixels, range(1, 3), CHOICES["all"])
    torch.testing.assert_close(outputs.residual.double(), residual, rtol=1e-4, atol=1e-4)


def test_every_kind_of_tower(any_clip, make_clt, make_pixels):
    """LayerScale in particular: the CLT's output replaces what the MLP adds to the stream."""
    clt, pixels = make_clt(any_clip), make_pixels(2, any_clip.tower.image_size)
    outputs = Replacement(any_clip.tower, clt)(pixels, range(1, 3), "patches")
    residual, _, _ = naive_replacement(any_clip.tower, clt, pixels, range(1, 3), CHOICES["patches"])
    torch.testing.assert_close(outputs.residual.double(), residual, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", CHOICES)
def test_an_empty_window_is_the_tower_bit_for_bit(clip, clt, make_pixels, tokens):
    taps = clip.tower(make_pixels(3))
    for window in (range(0), range(2, 2), range(3, 3)):
        outputs = Replacement(clip.tower, clt)(make_pixels(3), window, tokens)
        assert torch.equal(outputs.residual, taps.residual_out)
        assert torch.equal(outputs.mlp_in, taps.mlp_in)
        assert torch.equal(outputs.mlp_out, taps.mlp_out)
        assert outputs.codes == [None] * 3


def test_nothing_is_encoded_that_nothing_decodes(clip, make_clt, make_pixels):
    def encoded(window, **architecture):
        clt = make_clt(clip, **architecture)
        codes = Replacement(clip.tower, clt)(make_pixels(2), window, "cls").codes
        assert all(code is None or len(code.values) == 2 for code in codes)
        return [layer for layer, code in enumerate(codes) if code is not None]

    assert encoded(range(1, 2)) == [0, 1]
    assert encoded(range(2, 3)) == [0, 1, 2]
    assert encoded(range(1, 2), cross_layer=False) == [1]


def test_no_mlp_is_run_where_its_output_is_replaced(clip, clt, make_pixels, monkeypatch):
    ran = []
    own = Tower.mlp_output

    def spy(tower, layer, mlp_in):
        ran.append((layer, mlp_in.shape[1]))
        return own(tower, layer, mlp_in)

    monkeypatch.setattr(Tower, "mlp_output", spy)
    model = Replacement(clip.tower, clt)
    model(make_pixels(1), range(1, 3), "all")
    assert ran == [(0, 17)]
    ran.clear()
    model(make_pixels(1), range(1, 3), "cls")
    assert ran == [(0, 17), (1, 16), (2, 16)]
    ran.clear()
    model(make_pixels(1), range(1, 2), "patches")
    assert ran == [(0, 17), (1, 1), (2, 17)]


@pytest.mark.parametrize("tokens", CHOICES)
def test_gradients_reach_every_encoder_and_decoder_through_the_tower(clip, make_clt, make_pixels, tokens):
    """Against autograd through all F pre-activations and dense decoders."""
    window = range(1, 3)
    sparse = make_clt(clip).requires_grad_(True)
    dense = make_clt(clip).requires_grad_(True)
    for encoder in dense.encoders:
        encoder.forward = encoder.encode_dense
    for decoder in dense.decoders:
        decoder.forward = decoder.decode_dense
    for clt in (sparse, dense):
        outputs = Replacement(clip.tower, clt)(make_pixels(2), window, tokens)
        clip.tower.head(outputs.residual[:, 0]).square().sum().backward()
    for (name, parameter), reference in zip(sparse.named_parameters(), dense.parameters(), strict=True):
        if name.startswith("decoders.0."):
            assert parameter.grad is None, name
        elif (tokens, name) not in [("patches", "decoders.2.bias")]:
            torch.testing.assert_close(parameter.grad, reference.grad, rtol=1e-3, atol=1e-4, msg=name)
            if tokens != "patches" or not name.startswith(("decoders.2", "encoders.2")):  # no effect on [CLS]
                assert parameter.grad.abs().sum() > 0, name
    assert all(parameter.grad is None for parameter in clip.tower.parameters())


def test_the_last_windows_gradient_is_the_difference_quotient(clip, make_clt, make_pixels):
    clt = make_clt(clip).requires_grad_(True)
    model, pixels = Replacement(clip.tower, clt), make_pixels(2)

    def loss():
        return model(pixels, range(0, 3)).residual.double().square().mean()

    loss().backward()
    weight = clt.decoders[0].bias
    with torch.no_grad():
        step = 1e-3
        weight[3] += step
        more = loss()
        weight[3] -= 2 * step
        less = loss()
    assert weight.grad[3].item() == pytest.approx(((more - less) / (2 * step)).item(), rel=0.02)


@pytest.mark.parametrize("window", [range(0, 4), range(-1, 2), range(0, 3, 2), range(3, 4)])
def test_layers_that_do_not_exist_are_refused(clip, clt, make_pixels, window):
    with pytest.raises(ValueError, match="window"):
        Replacement(clip.tower, clt)(make_pixels(1), window)


def test_a_clt_of_another_tower_is_refused(make_clip, clip, clt):
    other = make_clip(vision_cfg={"layers": 2})
    with pytest.raises(ValueError, match="but the tower has 2 of 32"):
        Replacement(other.tower, clt)
