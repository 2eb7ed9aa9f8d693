"""Offline: recipes -> activations -> Cross-Layer Transcoder checkpoints -> metrics. Never imported by serving."""
