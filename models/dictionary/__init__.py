"""Sparse dictionaries for a tower's MLPs: the Cross-Layer Transcoder, its sparsifiers, the replacement model."""
