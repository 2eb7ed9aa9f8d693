"""An open_clip CLIP and its internals: loading, the vision tower with its taps, attention, the tokenizer."""
