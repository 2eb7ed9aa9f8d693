"""The tower's taps and foldings against open_clip's own forward pass and a float64 reference."""

import json
import shutil
from dataclasses import replace

import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU
from PIL import Image

from vitrine.models.clip.attention import Attention
from vitrine.models.clip.errors import ClipError
from vitrine.models.clip.loading import load_clip, model_sha256
from vitrine.models.clip.tower import Tower, UnsupportedTower


@pytest.fixture
def pixels(any_clip, make_pixels):
    return make_pixels(3, any_clip.tower.image_size)


def test_taps_add_up_to_the_final_residual(any_clip, pixels):
    taps = any_clip.tower(pixels)
    total = taps.residual_in + taps.attn_out.sum(0) + taps.mlp_out.sum(0)
    torch.testing.assert_close(total, taps.residual_out, rtol=0, atol=1e-5)


def test_head_of_the_final_residual_is_encode_image(any_clip, pixels):
    residual = any_clip.tower(pixels).residual_out
    expected = any_clip.model.encode_image(pixels)
    torch.testing.assert_close(any_clip.tower.head(residual[:, 0]), expected, rtol=1e-5, atol=1e-5)


def test_taps_are_what_the_blocks_own_modules_see(any_clip, pixels):
    seen = {"ln_2": [], "ls_1": [], "ls_2": []}
    hooks = [
        getattr(block, name).register_forward_hook(lambda _m, _i, output, name=name: seen[name].append(output))
        for block in any_clip.tower.blocks
        for name in seen
    ]
    any_clip.model.encode_image(pixels)
    for hook in hooks:
        hook.remove()

    taps = any_clip.tower(pixels)
    for tap, name in ((taps.mlp_in, "ln_2"), (taps.attn_out, "ls_1"), (taps.mlp_out, "ls_2")):
        torch.testing.assert_close(tap, torch.stack(seen[name]), rtol=1e-5, atol=1e-5)


def test_shapes_are_those_of_the_configuration(any_clip, pixels):
    tower = any_clip.tower
    height, width = tower.image_size
    assert (tower.layers, tower.width, tower.embedding) == (3, 32, 24)
    assert tower.tokens == 1 + height * width // 64
    assert tower(pixels).mlp_in.shape == (3, 3, tower.tokens, 32)


def test_attention_written_out_is_attention(any_clip, pixels):
    tower, stream = any_clip.tower, any_clip.tower.embed(pixels)
    normed = tower.blocks[1].ln_1(stream)
    _, weights = tower.blocks[1].attn(normed, normed, normed, need_weights=True, average_attn_weights=False)
    for cls_only in (False, True):
        attention = Attention(tower.blocks[1], cls_only)(stream)
        torch.testing.assert_close(attention.out, tower.attention(1, stream, cls_only), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(attention.weights, weights[:, :, :1] if cls_only else weights, rtol=1e-5, atol=1e-5)


def test_attention_of_cls_alone_is_the_first_of_all(any_clip, pixels):
    stream = any_clip.tower.embed(pixels)
    alone = any_clip.tower.attention(1, stream, cls_only=True)
    assert alone.shape == (3, 1, 32)
    torch.testing.assert_close(alone, any_clip.tower.attention(1, stream)[:, :1], rtol=1e-5, atol=1e-6)


def test_prior_is_cls_of_the_first_stream_for_every_image(any_clip, pixels):
    first, second = any_clip.tower(pixels).residual_in[:2]
    assert not torch.allclose(first[1:], second[1:])
    for image in (first, second):
        torch.testing.assert_close(image[0], any_clip.tower.prior(), rtol=1e-6, atol=1e-6)


def test_fold_is_ln_post_and_projection_up_to_sigma(any_clip):
    visual = any_clip.model.visual
    residual = 5 + 3 * torch.randn(100, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gamma, bias, projection = (p.double() for p in (visual.ln_post.weight, visual.ln_post.bias, visual.proj))
    mean = residual.mean(-1, keepdim=True)
    sigma = ((residual - mean).square().mean(-1, keepdim=True) + visual.ln_post.eps).sqrt()
    expected = (gamma * (residual - mean) / sigma + bias) @ projection

    matrix, beta = any_clip.tower.fold()
    folded = residual @ matrix.double() / sigma + beta.double()
    torch.testing.assert_close(folded, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(any_clip.tower.head(residual.float()).double(), expected, rtol=0, atol=1e-5)


def test_fold_gives_nothing_to_a_component_without_variation(clip):
    matrix, _ = clip.tower.fold()
    torch.testing.assert_close(torch.full((32,), 7.0) @ matrix, torch.zeros(24), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("vision_cfg", "named"),
    [
        ({"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2}, "attentional pooling"),
        ({"pool_type": "avg"}, "pool_type 'avg'"),
        ({"qk_norm": True}, "CustomResidualAttentionBlock"),
        ({"block_type": "custom"}, "CustomResidualAttentionBlock"),
        ({"layers": [1, 1, 1, 1], "head_width": 64}, "ModifiedResNet"),
    ],
)
def test_towers_without_an_exact_account_are_refused_by_name(write_clip, vision_cfg, named):
    config, weights = write_clip(vision_cfg=vision_cfg)
    with pytest.raises(UnsupportedTower, match=named):
        load_clip(None, str(weights), config)


def test_tower_without_projection_is_refused(write_clip):
    visual = open_clip.CLIP(**json.loads(write_clip()[0].read_text())).visual
    visual.proj = None
    with pytest.raises(UnsupportedTower, match="without projection"):
        Tower(visual)


def test_sigmoid_clip_is_refused(write_clip):
    config, weights = write_clip(init_logit_bias=-10.0)
    with pytest.raises(UnsupportedTower, match="logit bias"):
        load_clip(None, str(weights), config)


def test_quick_gelu_of_the_configuration_is_honoured(make_clip, make_pixels):
    plain, quick = make_clip(), make_clip(quick_gelu=True)
    assert all(map(torch.equal, plain.model.state_dict().values(), quick.model.state_dict().values()))
    gelu = quick.tower.blocks[0].mlp.gelu
    assert isinstance(gelu, QuickGELU)
    x = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(gelu(x), x / (1 + torch.exp(-1.702 * x)))
    pixels = make_pixels(1)
    assert not torch.allclose(plain.model.encode_image(pixels), quick.model.encode_image(pixels), atol=1e-4)


@pytest.mark.parametrize("overrides", [{"quick_gelu": True}, {"vision_cfg": {"head_width": 16}}])
def test_clips_of_the_same_weights_that_compute_otherwise_have_another_sha256(make_clip, overrides):
    assert make_clip(**overrides).sha256 != make_clip().sha256


def test_unknown_name_is_named():
    with pytest.raises(ClipError, match="no model named 'ViT-Z-99'"):
        load_clip("ViT-Z-99", "openai")


def test_neither_name_nor_configuration():
    with pytest.raises(ClipError, match="no CLIP is given"):
        load_clip(None, "openai")


def test_unknown_tag_lists_the_known_ones():
    with pytest.raises(ClipError, match=r"'nobody'.*tags for ViT-B-32: .*openai.*laion2b_s34b_b79k"):
        load_clip("ViT-B-32", "nobody")


def test_missing_weights_of_a_configuration(write_clip):
    config, weights = write_clip()
    with pytest.raises(ClipError, match=r"no-such-file.*tiny has no published weights"):
        load_clip(None, str(weights.with_name("no-such-file")), config)


@pytest.fixture
def local_clip(write_clip, tmp_path):
    """A folder with a CLIP as open_clip saves it: configuration, preprocessing, weights."""
    config, weights = write_clip()
    mean = [0.1, 0.2, 0.3]
    content = {"model_cfg": json.loads(config.read_text()), "preprocess_cfg": {"mean": mean, "resize_mode": "squash"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
    shutil.copy(weights, tmp_path / "open_clip_model.safetensors")
    return tmp_path


def test_clip_that_brings_its_own_weights(local_clip, clip, make_pixels):
    name = f"local-dir:{local_clip}"
    loaded = load_clip(name, None)
    assert (loaded.name, loaded.sha256, loaded.context) == (f"local-dir:{local_clip.name}", clip.sha256, 16)
    assert list(loaded.preprocess["mean"]) == [0.1, 0.2, 0.3]
    assert loaded.preprocess["resize_mode"] == "squash"
    torch.testing.assert_close(loaded.tower(make_pixels(2)), clip.tower(make_pixels(2)))
    with pytest.raises(ClipError, match="has its own weights; omit `weights`"):
        load_clip(name, "openai")


def test_folder_without_a_clip_is_named(tmp_path):
    with pytest.raises(ClipError, match=f"open_clip cannot load local-dir:{tmp_path}/nothing: "):
        load_clip(f"local-dir:{tmp_path}/nothing", None)


def test_folder_without_weights_is_not_made_up(local_clip):
    weights = local_clip / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ClipError, match=rf"^{weights} is damaged or incomplete .*: copy or download it again$"):
        load_clip(f"local-dir:{local_clip}", None)
    weights.unlink()
    with pytest.raises(ClipError, match=rf"^{local_clip} has no weights: put open_clip_model.safetensors there$"):
        load_clip(f"local-dir:{local_clip}", None)


def test_name_without_weights_lists_the_known_ones():
    with pytest.raises(ClipError, match=r"tags for ViT-B-32: .*openai"):
        load_clip("ViT-B-32", None)


@pytest.mark.parametrize("vision_cfg", [{"colour": "red"}, {"width": 33}])
def test_impossible_configuration_is_reported(tmp_path, write_clip, vision_cfg):
    config, weights = write_clip()
    content = json.loads(config.read_text())
    content["vision_cfg"] |= vision_cfg
    other = tmp_path / "impossible.json"
    other.write_text(json.dumps(content))
    with pytest.raises(ClipError, match="open_clip cannot load impossible"):
        load_clip(None, str(weights), other)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "does not exist"),
        ("{not json", "is not JSON"),
        ('{"embed_dim": 8}', "does not have text_cfg, vision_cfg"),
        ("3", ""),
    ],
)
def test_unusable_configuration_is_named(tmp_path, text, message):
    config = tmp_path / "mine.json"
    if text is not None:
        config.write_text(text)
    with pytest.raises(ClipError, match=f"mine.json.*{message}"):
        load_clip(None, "whatever", config)


def test_loaded_clip_names_its_weights_and_is_frozen(clip):
    assert (clip.name, clip.weights, clip.context) == ("tiny", "tiny.safetensors", 16)
    assert clip.logit_scale == pytest.approx(1 / 0.07)
    assert not clip.model.training
    assert not any(parameter.requires_grad for parameter in clip.model.parameters())


def test_sha256_depends_on_every_weight_and_its_name():
    layer = torch.nn.Linear(3, 2)
    before = model_sha256(layer)
    assert model_sha256(torch.nn.Sequential(layer)) != before
    with torch.no_grad():
        layer.bias[1] += 1
    assert model_sha256(layer) != before


def test_labels_are_encoded_as_clip_does(clip):
    labels, templates = ["cat", "dog"], ["a photo of a {}", "a {}", "one {} here"]
    expected = []
    for label in labels:
        rows = []
        for template in templates:
            row = clip.model.encode_text(clip.tokenizer([template.format(label)]))[0]
            rows.append(row / row.norm())
        mean = torch.stack(rows).mean(0)
        expected.append(mean / mean.norm())
    torch.testing.assert_close(clip.encode_labels(labels, templates), torch.stack(expected), rtol=1e-5, atol=1e-6)


def test_label_with_braces_is_taken_literally(clip):
    embedding = clip.encode_labels(["{x}"], ["a {}"])
    expected = clip.model.encode_text(clip.tokenizer(["a {x}"]), normalize=True)
    torch.testing.assert_close(embedding, expected)


@pytest.fixture
def image(data_root):
    with Image.open(data_root / "val/red circle/00.png") as opened:
        return opened.convert("RGB")


def test_transform_resizes_crops_and_normalises_as_open_clip(clip, image):
    mean, std = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
    expected = open_clip.image_transform(32, is_train=False, mean=mean, std=std, interpolation="bicubic")(image)
    torch.testing.assert_close(clip.transform()(image), expected)


def test_transform_follows_the_preprocessing(clip, image):
    squashed = replace(clip, preprocess=clip.preprocess | {"resize_mode": "squash"})
    assert squashed.transform()(image).shape == (3, 32, 32)
    assert not torch.allclose(squashed.transform()(image), clip.transform()(image))
