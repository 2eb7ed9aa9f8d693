"""Serves a bundle over HTTP. Runs without torch: numpy, ONNX Runtime, Pillow, FastAPI, BentoML."""
