"""The contents of a bundle: its files, and the names and shapes of its graphs' inputs and outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Variant = Literal["int8", "fp16"]
Precision = Literal["fp32", "int8", "fp16"]
Dictionary = Literal["clt", "residual"]  # whose features

MANIFEST = "manifest.json"
REQUIRED = (
    "vision.onnx",
    "vision.onnx.data",
    "text.onnx",
    "text.onnx.data",
    "tokenizer.json",
    "fold.npy",
    "MODEL_CARD.md",
)
REQUIRED_WITH_FEATURES = ("directions.npy",)
READ_BY_GRAPHS = (".onnx", ".data", ".npy")  # ends of the names of files that a graph may read beside itself
# Folders of the cards, each with all of these files; the manifest's fields have the same names.
CARDS: dict[Dictionary, str] = {"clt": "cards", "residual": "residual_cards"}
CARD_FILES = ("features.parquet", "images.parquet", "references.npz")
# Outputs of vision.onnx for `pixels` [B, 3, H, W]; R = 2L + 3 rows, see `models.account.ledger`. Without a CLT a graph
# has some of the outputs and inputs in this file, see `given`.
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
COMPONENTS = "components"  # [B, R, d] in residual space, an output as well; graphs of older bundles have none
# [B, L, D] the MLPs' rows, an output as well; graphs of older bundles have none. Without a CLT `rows` has them.
MLP_ROWS = "mlp_rows"
# Computed only where the input `details` is true (else B is 0): see `models.account.ledger.Details`.
DETAILS_INPUT = "details"  # [] bool
DETAILS = (
    "lens",  # [B, L, D]
    "attention_weights",  # [B, L, H, T]
    "attention_values",  # [B, L, T, d]
    "token_norms",  # [B, T]
)
HEAD_COMPONENTS = "head_components"  # [B, L, H, d] with them; graphs of older bundles have none
ALWAYS = (*VISION_OUTPUTS, COMPONENTS, MLP_ROWS)
ON_REQUEST = (*DETAILS, HEAD_COMPONENTS)
EVERY_OUTPUT = (*ALWAYS, *ON_REQUEST)
# Inputs of replacement.onnx besides `pixels`, and its outputs.
REPLACED_INPUT = "replaced"  # [L, 2] bool: `models.account.windows.replacement_mask`
REPLACEMENT_OUTPUTS = (
    "embedding",  # [B, D]
    "contributions",  # [B, 2, L, L]: C for [CLS] and its mean over patches; [target, source]
)
# Interventions in the running network (`models.graph.rerun`): inputs besides `pixels`, fields of
# `models.interventions.changes.Changes`, for n features and m directions. Outputs: `ALWAYS`, with R = 2L + 4 rows and
# k + n places.
RERUN = "rerun.onnx"
RERUN_INPUTS = (
    "layers",  # [n] int64
    "indices",  # [n] int64
    "gains",  # [B, n, T]
    "offsets",  # [B, n, T]
    "places",  # [m] int64
    "directions",  # [m, d]
    "direction_gains",  # [B, m, T]
    "direction_offsets",  # [B, m, T]
    "heads",  # [B, L, H, T]
    "attention",  # [B, L, T]
    "mlp",  # [B, L, T]
)
ENCODERS = "encoders.npy"  # [L, F, d]
BASELINE_STREAM = "baseline_stream.npy"  # [L + 1, 2, d] the average picture before each block and after the last
# Of a bundle with sources.onnx: the fields of `models.account.sources.Baseline`.
BASELINE = ("baseline_activations.npy", "baseline_written.npy")
# Outputs of every trace for `pixels` [B, 3, H, W]: `models.account.sources.HeldFast`.
HELD_FAST = (
    "embedding",  # [B, D]
    "scale",  # [B]
    "norm",  # [B]
    "attention_weights",  # [B, L, H, T, T]
    "before_attention",  # [B, L, T]
    "before_mlp",  # [B, L, T]
)
# Outputs of trace.onnx, see `models.account.sources.Trace`.
TRACE_OUTPUTS = (
    *HELD_FAST,
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
    "features",  # [n, L, T, k]
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

# Outputs and inputs of the graphs above that only a bundle with a CLT has.
OF_FEATURES = frozenset(
    {
        *("feature_indices", "feature_values", "projection", "fidelity", MLP_ROWS),
        *("indices", "values", "features", "biases", "gradients"),
    }
)

# Of a bundle with residual SAEs: `models.graph.gated_trace`, and what goes back through each block
# (`models.graph.residual`), L in all. The names of their files, and of their cards' folder, begin with this.
RESIDUAL = "residual_"
RESIDUAL_TRACE = f"{RESIDUAL}trace.onnx"
RESIDUAL_RERUN = f"{RESIDUAL}rerun.onnx"  # interventions in their features: as of `RERUN`
RESIDUAL_ACTIVATIONS = f"{RESIDUAL}activations.npy"  # [L - 1, 2, F] the average picture's, F the largest of them
RESIDUAL_TRACE_OUTPUTS = (
    *HELD_FAST,
    "gates",  # [B, L, T, M]
    "streams",  # [B, L, T, d]
    "deviations",  # [B, L - 1, T]
    "indices",  # [B, L - 1, T, k] int64
    "values",  # [B, L - 1, T, k] 0 in unused places
)
# Inputs for n directions after the last block, or for n features of the SAE after any other, whose standard deviations
# are `scales` [T]; then one layer's part of the trace, without the last three below block 0. Outputs: with an SAE below
# four, below block 0 two.
RESIDUAL_STARTS_LOGIT = ("direction",)  # [n, d]
RESIDUAL_STARTS = (
    "feature",  # [n] int64
    "token",  # [n] int64
    "scales",  # [T]
)
RESIDUAL_HELD = (
    "attention_weights",  # [H, T, T]
    "before_attention",  # [T]
    "before_mlp",  # [T]
    "gates",  # [T, M]
    "stream",  # [T, d]
    "deviations",  # [T]
    "indices",  # [T, k] int64
    "values",  # [T, k]
)
RESIDUAL_OUTPUTS = (
    "features",  # [n, T, k]
    "errors",  # [n, T]
    "bias",  # [n]
    "constant",  # [n]
)
RESIDUAL_OUTPUTS_EMBEDDINGS = (
    "embeddings",  # [n, T]
    "constant",  # [n]
)


def given(names: Sequence[str], features: bool) -> tuple[str, ...]:
    """Those of a graph's outputs or inputs that it has in a bundle with a CLT, or in one without."""
    return tuple(name for name in names if features or name not in OF_FEATURES)


def residual_file(block: int) -> str:
    """The file of the graph that goes back through a block."""
    return f"{RESIDUAL}block_{block}.onnx"


def residual_rows_file(layer: int, kind: str) -> str:
    """The table [F, d] of what the features of an SAE write (`decoder`) or read (`encoder`)."""
    return f"{RESIDUAL}{kind}_{layer}.npy"


def vision_file(precision: Precision) -> str:
    """The file of the vision graph in a precision."""
    return "vision.onnx" if precision == "fp32" else f"vision.{precision}.onnx"
