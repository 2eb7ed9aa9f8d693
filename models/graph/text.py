"""The text encoder for export to ONNX."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class TextGraph(nn.Module):
    """Tokens [N, context] -> unit text embeddings [N, D]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.encode_text(tokens, normalize=True)
