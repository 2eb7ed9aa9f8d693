"""From images to activations: sources, decoding in worker processes, token order, activations of the tower."""
