"""A CLIP of open_clip's, seen from inside: loading, the vision tower with its taps, attention, the tokenizer."""
