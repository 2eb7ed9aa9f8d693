"""The largest value of every setting that is a number, each with its reason: beyond it lies a typing mistake.

What a machine bears is less, and another on each; these keep one variable from taking all its processes or memory.
"""

from __future__ import annotations

MOST: dict[str, tuple[float, str]] = {
    "gpu_memory_bytes": (2**40, "no GPU has more"),
    "workers": (64, "each loads the whole bundle"),
    "threads": (256, "ONNX Runtime starts them for each graph and worker, and no inference is faster for more"),
    "decode_threads": (256, "each may take 0.6 GB for an image"),
    "batch_size": (1_024, "an inference takes memory for all of its images at once"),
    "batch_wait_ms": (10_000, "every answer waits that long"),
    "queue_size": (65_536, "each image that waits takes memory, and the last waits for all others"),
    "deadline_seconds": (3_600, "no client waits longer"),
    "max_body_bytes": (2**30, "a body is held in memory"),
    "max_image_pixels": (400_000_000, "decoding one takes up to 6 GB"),
    "max_jpeg_pixels": (1_000_000_000, "decoding one takes a processor up to half a minute"),
    "max_image_side": (65_535, "the formats have no larger ones"),
    "max_batch": (4_096, "a request is answered in one piece"),
    "max_labels": (65_536, "their texts are encoded while others wait"),
    "max_label_chars": (8_192, "CLIP reads some seventy tokens"),
    "max_templates": (4_096, "their texts are encoded while others wait"),
    "max_prompts": (2**20, "they are encoded while others wait"),
    "max_targets": (4_096, "each has an account in the answer"),
    "max_circuit_nodes": (65_536, "each takes memory for the edges into it from every active feature"),
    "max_interventions": (16_384, "each takes memory for every token"),
    "label_cache": (2**22, "each takes 2 to 4 kB"),
    "trace_share": (1, "it is a share"),
    "max_header_bytes": (2**20, "headers are held in memory for each connection"),
    "header_seconds": (3_600, "a connection is held that long for nothing"),
    "keep_alive_seconds": (3_600, "a connection is held that long for nothing"),
    "send_seconds": (3_600, "an answer is held in memory that long"),
    "decode_seconds": (600, "a place is held that long by one image"),
    "shutdown_seconds": (3_600, "whoever stops a service waits for it"),
    "max_connections": (65_536, "each takes one of the process's file descriptors"),
    "max_bytes_in_hand": (2**40, "no machine has more memory"),
    "max_prompt_chars": (2**26, "their texts are read while others wait"),
    "max_answer_values": (2**28, "an answer is held in memory"),
}


def check_bound(name: str, value: float) -> None:
    """Raise `ValueError` for a number over its bound."""
    if name in MOST and value > MOST[name][0]:
        most, reason = MOST[name]
        raise ValueError(f"at most {most:,}, since {reason}")
