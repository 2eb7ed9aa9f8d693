"""A training run: objective, steps, cascade phase, devices, progress."""
