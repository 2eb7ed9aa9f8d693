"""Interventions: what a prediction would be with some features, rows or heads changed; and edits, which keep them."""
