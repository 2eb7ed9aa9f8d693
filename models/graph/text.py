"""The text encoder for export to ONNX.

A causal tower that reads its end token gives a text the same embedding at its own length as padded to the context:
the padding comes after all that the end token attends to. Labels have about 8 tokens and the context is 77, so such
towers are exported for texts of any length, at a tenth of the work.
"""

from __future__ import annotations

from typing import Any

import onnx
import torch
from open_clip.model import CLIP, CustomTextCLIP
from open_clip.transformer import TextTransformer, text_global_pool
from torch import Tensor, nn
from torch.nn.functional import normalize

from vitrine.models.graph.onnx_file import to_onnx

SHORTEST = 2  # tokens: start and end
POOLED_AT_END = ("argmax", "eos")  # open_clip's names; argmax, as the end token has the highest number


class TextGraph(nn.Module):
    """Tokens [N, T] -> unit text embeddings [N, D]. T is from `SHORTEST` to the context if `any_length`, else the
    context."""

    def __init__(self, model: Any) -> None:
        """model: open_clip's."""
        super().__init__()
        self.model = model
        self.any_length = _takes_any_length(model)

    def forward(self, tokens: Tensor) -> Tensor:
        if not self.any_length:
            return self.model.encode_text(tokens, normalize=True)
        own = isinstance(self.model, CLIP)  # its text tower's modules are its own, not those of a module `text`
        tower = self.model if own else self.model.text
        length = tokens.shape[1]
        x = tower.token_embedding(tokens) + tower.positional_embedding[:length]
        x = tower.transformer(x, attn_mask=tower.attn_mask[:length, :length])
        pool, end = (tower.text_pool_type, tower.text_eos_id) if own else (tower.pool_type, tower.eos_id)
        x = tower.ln_final(text_global_pool(x, tokens, pool, end))  # token by token, so that pooling may come first
        projection = tower.text_projection
        if projection is not None:
            x = projection(x) if isinstance(projection, nn.Linear) else x @ projection
        return normalize(x, dim=-1)


def text_to_onnx(graph: TextGraph, context: int) -> onnx.ModelProto:
    """The graph as an ONNX model: `tokens` [N, T] -> `text_embedding` [N, D], T dynamic where `graph.any_length`."""
    # The example is shorter than the context: the exporter would take slices of full length out of the graph.
    axes = {0: torch.export.Dim("batch")}
    if graph.any_length:
        axes[1] = torch.export.Dim("length", min=SHORTEST, max=context)
    tokens = torch.zeros(2, context - 1 if graph.any_length else context, dtype=torch.long)
    return to_onnx(graph, {"tokens": tokens}, ("text_embedding",), dynamic={"tokens": axes})


def _takes_any_length(model: Any) -> bool:
    """Whether an embedding does not depend on what follows the text: causal attention, read at the end token.

    Not so in SigLIP (attends to the padding), CoCa (appends a class token) and Hugging Face's text towers.
    """
    if isinstance(model, CLIP):
        return model.attn_mask is not None and model.text_pool_type in POOLED_AT_END
    tower = model.text if isinstance(model, CustomTextCLIP) else None
    return (
        isinstance(tower, TextTransformer)
        and tower.attn_mask is not None
        and tower.cls_emb is None
        and tower.pool_type in POOLED_AT_END
    )
