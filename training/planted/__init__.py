"""A CLIP with a spurious cue that is known, since it was put there: what `vitrine debias` is measured on."""
