"""What `vitrine evaluate` measures, an experiment a file; `evaluate` runs them in as few passes as it can."""
