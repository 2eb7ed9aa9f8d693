"""What a CLIP reads of a text: cleaning, tokens, labels it cannot tell apart. Needs neither torch nor open_clip."""
