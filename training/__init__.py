"""Offline: recipes -> activations -> Cross-Layer Transcoder checkpoints -> metrics. Serving never imports this."""
