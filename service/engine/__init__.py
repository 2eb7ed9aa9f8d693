"""The bundle's graphs at work: ONNX Runtime, batches, images to pixels, labels to embeddings."""
