"""The contents of a bundle: its files, and the names and shapes of its graphs' inputs and outputs."""

from __future__ import annotations

from typing import Literal

MANIFEST = "manifest.json"
REQUIRED = (
    "vision.onnx",
    "vision.onnx.data",
    "text.onnx",
    "text.onnx.data",
    "tokenizer.json",
    "directions.npy",
    "fold.npy",
    "MODEL_CARD.md",
)
READ_BY_GRAPHS = (".onnx", ".data", ".npy")  # ends of the names of files that a graph may read beside itself
CARDS = ("cards/features.parquet", "cards/images.parquet", "cards/references.npz")
# Outputs of vision.onnx for `pixels` [B, 3, H, W]; R = 2L + 3 rows, see `models.account.ledger`.
VISION_OUTPUTS = (
    "embedding",  # [B, D]
    "rows",  # [B, R, D]
    "sigma",  # [B]
    "sigma_without",  # [B, R]
    "norm",  # [B]
    "feature_indices",  # [B, L, k] int64
    "feature_values",  # [B, L, k] 0 in unused places
    "projection",  # [B, L] summing to 1, or all 0
    "fidelity",  # [B, 2]: r2, cosine
)
# Computed only where the input `details` is true (else B is 0): see `models.account.ledger.Details`.
DETAILS_INPUT = "details"  # [] bool
DETAILS = (
    "lens",  # [B, L, D]
    "attention_weights",  # [B, L, H, T]
    "attention_values",  # [B, L, T, d]
    "token_norms",  # [B, T]
)
# Inputs of replacement.onnx besides `pixels`, and its outputs.
REPLACED_INPUT = "replaced"  # [L, 2] bool: `models.account.windows.replacement_mask`
REPLACEMENT_OUTPUTS = (
    "embedding",  # [B, D]
    "contributions",  # [B, 2, L, L]: C for [CLS] and its mean over patches; [target, source]
)
# Of a bundle with sources.onnx: the fields of `models.account.sources.Baseline`.
BASELINE = ("baseline_activations.npy", "baseline_written.npy")
# Outputs of trace.onnx for `pixels` [B, 3, H, W], see `models.account.sources.Trace`; the last two only with a CLT.
TRACE_OUTPUTS = (
    "embedding",  # [B, D]
    "scale",  # [B]
    "norm",  # [B]
    "attention_weights",  # [B, L, H, T, T]
    "before_attention",  # [B, L, T]
    "before_mlp",  # [B, L, T]
    "embedded",  # [B, T, d]
    "written",  # [B, L, T, d]
    "indices",  # [B, L, T, k] int64
    "values",  # [B, L, T, k] 0 in unused places
)
HELD = TRACE_OUTPUTS[TRACE_OUTPUTS.index("attention_weights") :]  # what sources.onnx takes of one image's trace
# Inputs of sources.onnx besides, and its outputs for n directions.
STARTS = (
    "direction",  # [n, d]
    "layer",  # [n] int64
    "token",  # [n] int64
    "feature",  # [n] int64
)
SOURCES_OUTPUTS = (
    "embeddings",  # [n, T]
    "errors",  # [n, L, T]
    "constants",  # [n]
    "features",  # [n, L, T, k]; this and what follows only with a CLT
    "biases",  # [n, L]
    "gradients",  # [n, L, 2, d] at the MLPs' outputs: at [CLS], and summed over patches
)
# Inputs of scores.onnx beside some of `HELD`, and its outputs for n heads (`models.account.attention_score`).
SCORES_HELD = ("attention_weights", "before_attention", "embedded", "written")
HEADS = (
    "layer",  # [n] int64
    "head",  # [n] int64
)
SCORES_OUTPUTS = (
    "queries",  # [n, T, d / H]
    "keys",  # [n, T, d / H]
    "rows",  # [n, 2, d / H, d] of W_Q and W_K
    "biases",  # [n, 2, d / H]
)

Variant = Literal["int8", "fp16"]
Precision = Literal["fp32", "int8", "fp16"]


def vision_file(precision: Precision) -> str:
    """The file of the vision graph in a precision."""
    return "vision.onnx" if precision == "fp32" else f"vision.{precision}.onnx"
