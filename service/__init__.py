"""Online: a bundle behind HTTP. Runs without torch: numpy, ONNX Runtime, Pillow, FastAPI, BentoML."""
