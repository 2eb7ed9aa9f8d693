"""A small CLIP trained from scratch, for the demo."""
