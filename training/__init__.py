"""Offline: recipes -> activations -> Cross-Layer Transcoder checkpoints -> metrics. Never imported by serving."""

from vitrine.telemetry import keep_caches_apart

keep_caches_apart()
