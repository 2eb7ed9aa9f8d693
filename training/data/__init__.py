"""From images to activations: sources, decoding in worker processes, the order of tokens, the tower's activations."""
