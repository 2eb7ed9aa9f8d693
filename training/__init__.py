"""Offline: recipes -> activations -> checkpoints of CLTs or residual SAEs -> metrics. Never imported by serving."""

from vitrine.telemetry import keep_caches_apart

keep_caches_apart()
