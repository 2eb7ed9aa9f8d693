"""Runs the bundle's graphs: ONNX Runtime, batches, images to pixels, labels to embeddings."""
