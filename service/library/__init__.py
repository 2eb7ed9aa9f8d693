"""Vitrine in Python, without a server: `vitrine.load` gives an `Explainer`, which answers as the service does."""
