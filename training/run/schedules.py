"""Schedules over a run: learning rate, code width, sparsity pressure."""

from __future__ import annotations

import math


def learning_rate(step: int, steps: int, peak: float, warmup_steps: int, decay_share: float) -> float:
    """Linear warm-up, constant, then cosine decay to 0 over the last `decay_share` of the run."""
    warmup = min(1.0, (step + 1) / max(1, warmup_steps))
    start = steps * (1 - decay_share)
    done = max(0.0, (step - start) / max(1.0, steps - start))
    return peak * warmup * 0.5 * (1 + math.cos(math.pi * done))


def ramp(step: int, steps: int, share: float) -> float:
    """Rises linearly from 0 to 1 over the first `share` of the run."""
    return min(1.0, step / (share * steps)) if share else 1.0


def widening(step: int, steps: int, start: float, share: float) -> float:
    """Factor of the code's final budgets: falls from `start` to 1 over the first `share` of the run."""
    return start + (1 - start) * ramp(step, steps, share)
