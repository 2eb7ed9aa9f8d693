"""An open_clip model whose vision tower can be read from inside.

The vision tower is a residual stream: `ln_pre(embeddings)`, to which every block adds its attention output and its
MLP output. `Tower` runs open_clip's own modules in open_clip's own order and hands out those pieces (*taps*), so
that their sum is the final residual, exactly:

    residual_out = residual_in + sum_l (attn_out[l] + mlp_out[l])        (LayerScale, where present, included)

L blocks (layers), B images, T tokens ([CLS] first, then patches row by row), d width, D embedding size.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from safetensors import SafetensorError
from torch import Tensor, nn

from vitrine.models.errors import VitrineError

BRINGS_WEIGHTS = ("hf-hub:", "local-dir:")  # open_clip's prefixes for models that come with their weights


class ClipError(VitrineError, ValueError):
    """A CLIP cannot be loaded; the message says what is known instead."""


class UnsupportedTower(VitrineError, ValueError):
    """The CLIP's vision tower is not one whose residual stream Vitrine can account for; the message says why."""


class Taps(NamedTuple):
    """One pass through the tower, seen from inside."""

    residual_in: Tensor  # [B, T, d] what enters block 0 (after ln_pre)
    mlp_in: Tensor  # [L, B, T, d] ln_2 outputs: what the MLPs read, and the CLT's encoders
    attn_out: Tensor  # [L, B, T, d] what attention adds to the stream
    mlp_out: Tensor  # [L, B, T, d] what the MLPs add to the stream: the CLT's targets
    residual_out: Tensor  # [B, T, d] what enters ln_post


class Tower(nn.Module):
    """The vision tower of a CLIP, with taps.

    Accepts open_clip's `VisionTransformer` with a class token read at the end: any size, GELU or QuickGELU, with or
    without `ln_pre` and LayerScale. Raises `UnsupportedTower` for every other tower.
    """

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual: Any
        self.blocks: Any
        _refuse_unsupported(visual)
        self.visual = visual
        self.blocks = self.visual.transformer.resblocks
        self.layers = len(self.blocks)
        self.width, self.embedding = (int(size) for size in self.visual.proj.shape)
        self.image_size: tuple[int, int] = tuple(self.visual.image_size)
        self.tokens = int(self.visual.positional_embedding.shape[0])

    def embed(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, H, W] to the residual stream before block 0 [B, T, d]."""
        return self.visual._embeds(pixels)

    def attention(self, layer: int, stream: Tensor, cls_only: bool = False) -> Tensor:
        """What block `layer`'s attention adds to the stream [B, T, d]; [B, 1, d] for [CLS] alone."""
        block = self.blocks[layer]
        normed = block.ln_1(stream)
        queries = normed[:, :1] if cls_only else normed
        return block.ls_1(block.attention(queries, k_x=normed, v_x=normed))

    def mlp(self, layer: int, stream: Tensor) -> tuple[Tensor, Tensor]:
        """(ln_2 output, what the MLP adds to the stream) of block `layer`, both shaped like `stream`."""
        mlp_in = self.mlp_input(layer, stream)
        return mlp_in, self.mlp_output(layer, mlp_in)

    def mlp_input(self, layer: int, stream: Tensor) -> Tensor:
        """What block `layer`'s MLP reads: the ln_2 output, shaped like `stream`."""
        return self.blocks[layer].ln_2(stream)

    def mlp_output(self, layer: int, mlp_in: Tensor) -> Tensor:
        """What block `layer`'s MLP adds to the stream for ln_2 outputs of any tokens, LayerScale included."""
        block = self.blocks[layer]
        return block.ls_2(block.mlp(mlp_in))

    def head(self, residual: Tensor) -> Tensor:
        """[CLS] residual [..., d] to the CLIP embedding [..., D], not normalised."""
        return self.visual.ln_post(residual) @ self.visual.proj

    def forward(self, pixels: Tensor) -> Taps:
        """Every tap of every token, for normalised pixels [B, 3, H, W]."""
        stream = residual_in = self.embed(pixels)
        mlp_ins, attn_outs, mlp_outs = [], [], []
        for layer in range(self.layers):
            attn_out = self.attention(layer, stream)
            stream = stream + attn_out
            mlp_in, mlp_out = self.mlp(layer, stream)
            stream = stream + mlp_out
            mlp_ins.append(mlp_in)
            attn_outs.append(attn_out)
            mlp_outs.append(mlp_out)
        return Taps(residual_in, torch.stack(mlp_ins), torch.stack(attn_outs), torch.stack(mlp_outs), stream)

    def prior(self) -> Tensor:
        """[CLS] before block 0 [d]: class token and its position through ln_pre, the same for every image."""
        visual = self.visual
        return visual.ln_pre(visual.class_embedding + visual.positional_embedding[0])

    def fold(self) -> tuple[Tensor, Tensor]:
        """ln_post and the projection as an affine map, up to one number per image.

        Returns (M [d, D], beta [D]) such that `head(r) = r @ M / sigma(r) + beta`, where `sigma(r)` is ln_post's
        standard deviation of that image's residual. M centres its argument, so that a component without any
        variation contributes nothing. Float64 inside, so that folding costs no precision.
        """
        matrix, beta = self._fold64()
        return matrix.float(), beta.float()

    def attention_fold(self) -> Tensor:
        """[L, d + 1, D]: what one unit of each value channel (`models.clip.attention`) adds to the embedding, as `fold`
        counts it; in the last row what every block's attention adds to every token, its values' and output's biases.
        """
        matrix, _ = self._fold64()
        tables = []
        for block in self.blocks:
            out, bias = block.attn.out_proj, block.attn.in_proj_bias.detach().double().chunk(3)[2]
            weight = out.weight.detach().double()
            constant = weight @ bias + out.bias.detach().double()
            tables.append(block.ls_1(torch.cat([weight.T, constant[None]])) @ matrix)
        return torch.stack(tables).float()

    def _fold64(self) -> tuple[Tensor, Tensor]:
        ln, proj = self.visual.ln_post, self.visual.proj.detach().double()
        scaled = ln.weight.detach().double()[:, None] * proj
        return scaled - scaled.mean(dim=0), ln.bias.detach().double() @ proj


def _refuse_unsupported(visual: nn.Module) -> None:
    """Raise `UnsupportedTower`, naming the part of `visual` that has no exact account."""
    if not isinstance(visual, VisionTransformer):
        raise UnsupportedTower(
            f"vision tower {type(visual).__module__}.{type(visual).__name__} is not supported: "
            "Vitrine needs open_clip's VisionTransformer (ViT-B-32, ViT-B-16, ViT-L-14, ...)"
        )
    block_types = {type(block).__name__ for block in visual.transformer.resblocks}
    custom_blocks = sorted(block_types - {ResidualAttentionBlock.__name__})
    reasons = {
        "attentional pooling (attn_pool)": visual.attn_pool is not None,
        f"pool_type '{visual.pool_type}' (only 'tok', the class token)": visual.pool_type != "tok",
        f"blocks of type {', '.join(custom_blocks)}": bool(custom_blocks),
        "a tower without projection": visual.proj is None,
        "output_tokens": visual.output_tokens,
    }
    if named := [reason for reason, present in reasons.items() if present]:
        raise UnsupportedTower(f"VisionTransformer with {'; '.join(named)} is not supported")


@dataclass(frozen=True)
class Clip:
    """A loaded CLIP in evaluation mode, float32, with what is needed to name it and to feed it."""

    model: Any  # open_clip's CLIP, a torch module
    tower: Tower
    tokenizer: Any  # open_clip's; texts -> tokens [N, context]
    name: str  # open_clip's model name
    weights: str  # open_clip's tag, or the file's name
    sha256: str  # `model_sha256`, so that a CLT is never put on another CLIP than its own
    preprocess: dict[str, Any]  # open_clip's PreprocessCfg as a dict: size, mean, std, interpolation, resize_mode

    @property
    def logit_scale(self) -> float:
        """s in logit = s * <image, text>."""
        return float(self.model.logit_scale.detach().exp())

    @property
    def context(self) -> int:
        """Tokens per text."""
        return int(self.tokenizer.context_length)

    def transform(self) -> Any:
        """open_clip's own evaluation transform: PIL image -> normalised pixels [3, H, W]."""
        keys = ("mean", "std", "interpolation", "resize_mode")
        return open_clip.image_transform(
            self.preprocess["size"], is_train=False, **{key: self.preprocess[key] for key in keys}
        )

    @torch.no_grad()
    def encode_labels(self, labels: list[str], templates: list[str]) -> Tensor:
        """Unit label embeddings [labels, D]: templates encoded, averaged and renormalised as CLIP does."""
        rows = []
        for label in labels:
            tokens = self.tokenizer([template.replace("{}", label) for template in templates])
            tokens = tokens.to(self.model.logit_scale.device)
            mean = self.model.encode_text(tokens, normalize=True).mean(dim=0)
            rows.append(mean / mean.norm())
        return torch.stack(rows)


def load_clip(name: str | None, weights: str | None, config: Path | None = None) -> Clip:
    """Load a CLIP with open_clip.

    Args:
        name: open_clip's model name ("ViT-B-32"), or a model that brings its own weights ("hf-hub:org/model",
            "local-dir:path"), or None with `config`.
        weights: one of open_clip's tags for that name ("openai", "laion2b_s34b_b79k"), or a checkpoint file; None
            for a model that brings its own.
        config: a model configuration in open_clip's JSON format, for a CLIP that open_clip does not know by name.

    Raises:
        ClipError: an unknown name, tag or file, with what is known.
        UnsupportedTower: the tower has no exact account.
    """
    if config is not None:
        name = _add_config(config)
    if name is None:
        raise ClipError("name a CLIP: an open_clip model name, or a configuration file")
    if name.startswith(BRINGS_WEIGHTS):
        if weights is not None:
            raise ClipError(f"{name} brings its own weights; leave `weights` out")
        model = _create(name)
    else:
        _check_weights(name, weights)
        # OpenAI's weights (and some others) were trained with QuickGELU, which plain model names do not say.
        quick_gelu = bool((open_clip.get_pretrained_cfg(name, weights) or {}).get("quick_gelu"))
        model = _create(name, pretrained=weights, force_quick_gelu=quick_gelu)
    model.eval().requires_grad_(False)
    if getattr(model, "logit_bias", None) is not None:
        raise UnsupportedTower(f"{name} has a logit bias (sigmoid loss, as SigLIP): no zero-shot softmax")
    return Clip(
        model=model,
        tower=Tower(model.visual),
        tokenizer=open_clip.get_tokenizer(name),
        name=f"local-dir:{Path(name).name}" if name.startswith("local-dir:") else name,  # no path of this machine
        weights=Path(weights).name if weights else "its own",
        sha256=model_sha256(model),
        preprocess=open_clip.get_model_preprocess_cfg(model),
    )


def _create(name: str, **options: Any) -> Any:
    """open_clip's `create_model`, its complaints (a download that fails, weights that do not fit) as `ClipError`."""
    try:
        return open_clip.create_model(name, precision="fp32", **options)
    except (OSError, RuntimeError, ValueError, TypeError, AssertionError, SafetensorError) as error:
        reason = str(error) or "its parts do not fit together"
        raise ClipError(f"open_clip cannot load {name}: {reason}") from error


def _add_config(config: Path) -> str:
    """Make a configuration file known to open_clip; returns the model's name."""
    if not config.is_file():
        raise ClipError(f"CLIP configuration {config} does not exist")
    try:
        fields = json.loads(config.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ClipError(f"CLIP configuration {config} is not JSON: {error}") from error
    keys = set(fields) if isinstance(fields, dict) else set()
    if missing := {"embed_dim", "vision_cfg", "text_cfg"} - keys:
        raise ClipError(f"CLIP configuration {config} lacks {', '.join(sorted(missing))}")
    open_clip.add_model_config(config)
    return config.stem


def _check_weights(name: str, weights: str | None) -> None:
    """Raise `ClipError` unless `name` is open_clip's and `weights` a file or one of its tags."""
    if name not in open_clip.list_models():
        raise ClipError(f"open_clip knows no model {name!r}; see `open_clip.list_models()`")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if weights is None or not (Path(weights).is_file() or weights in tags):
        known = f"tags for {name}: {', '.join(tags)}" if tags else f"{name} has no published weights"
        raise ClipError(f"weights {weights!r} are neither a file nor a tag of open_clip's; {known}")


def model_sha256(model: nn.Module) -> str:
    """What a model computes, as a digest: every module's type, heads and eps, every weight's name and bytes."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        options = [getattr(module, option, None) for option in ("num_heads", "eps")]
        digest.update(f"{name} {type(module).__name__} {options}\n".encode())
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
