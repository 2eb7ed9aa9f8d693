"""The graphs exported to ONNX: as torch modules, and their conversion to files."""
