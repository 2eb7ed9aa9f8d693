"""Sparse dictionaries of a tower's MLPs: the Cross-Layer Transcoder, its sparsifiers, the replacement model."""
