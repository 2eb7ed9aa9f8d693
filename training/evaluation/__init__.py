"""The experiments of `vitrine evaluate`, one per file; `evaluate` runs them in as few passes as possible."""
