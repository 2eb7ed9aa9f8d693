"""What `vitrine evaluate` measures, one experiment a room; `training.evaluate` runs them in as few passes as it can."""
