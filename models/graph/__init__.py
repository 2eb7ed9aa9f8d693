"""What is exported to ONNX: the graphs as torch modules, and what becomes of them as files."""
