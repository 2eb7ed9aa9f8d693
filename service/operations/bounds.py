"""The largest value of every setting that is a number, each with its reason: beyond it lies a typing mistake.

What a machine bears is less, and another on each; these keep one variable from taking all its processes or memory.
"""

from __future__ import annotations

MOST: dict[str, tuple[float, str]] = {
    "gpu_memory_bytes": (2**40, "no GPU has more"),
    "workers": (64, "each one loads the complete bundle"),
    "threads": (256, "ONNX Runtime starts them for each graph and worker, and more do not make an inference faster"),
    "decode_threads": (256, "each one may use 0.6 GB for an image"),
    "batch_size": (1_024, "an inference uses memory for all of its images at once"),
    "batch_wait_ms": (10_000, "every answer waits that long"),
    "queue_size": (65_536, "each waiting image uses memory, and the last one waits for all others"),
    "deadline_seconds": (3_600, "no client waits longer"),
    "max_body_bytes": (2**30, "a body is kept in memory"),
    "max_image_pixels": (400_000_000, "decoding one image uses up to 6 GB"),
    "max_jpeg_pixels": (1_000_000_000, "decoding one image takes up to half a minute of processor time"),
    "max_image_side": (65_535, "the formats do not allow larger images"),
    "max_batch": (4_096, "a request is answered as a whole"),
    "max_labels": (65_536, "other requests wait while their texts are encoded"),
    "max_label_chars": (8_192, "CLIP reads only about seventy tokens"),
    "max_templates": (4_096, "other requests wait while their texts are encoded"),
    "max_prompts": (2**20, "other requests wait while they are encoded"),
    "max_targets": (4_096, "each one adds an account to the answer"),
    "max_circuit_nodes": (65_536, "each one uses memory for the edges into it from every active feature"),
    "max_interventions": (16_384, "each one uses memory for every token"),
    "label_cache": (2**22, "each one uses 2 to 4 kB"),
    "trace_share": (1, "it is a share"),
    "max_header_bytes": (2**20, "headers are kept in memory for each connection"),
    "header_seconds": (3_600, "an idle connection stays open that long"),
    "keep_alive_seconds": (3_600, "an idle connection stays open that long"),
    "send_seconds": (3_600, "an answer is kept in memory that long"),
    "decode_seconds": (600, "one image can occupy a decoder that long"),
    "shutdown_seconds": (3_600, "stopping the service takes that long"),
    "max_connections": (65_536, "each one uses a file descriptor of the process"),
    "max_bytes_in_hand": (2**40, "no machine has more memory"),
    "max_prompt_chars": (2**26, "other requests wait while their texts are read"),
    "max_answer_values": (2**28, "an answer is kept in memory"),
}


def check_bound(name: str, value: float) -> None:
    """Raise `ValueError` for a number over its bound."""
    if name in MOST and value > MOST[name][0]:
        most, reason = MOST[name]
        raise ValueError(f"at most {most:,}, because {reason}")
