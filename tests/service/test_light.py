"""The service and the command run without torch: they do not import it and work where it is not installed."""

import os

import pytest

TRAINING_ONLY = ("torch", "torchvision", "open_clip", "onnx", "safetensors")
IMPORTS = "import sys, vitrine.commands, vitrine.service.app, vitrine.service.exports.render"


def test_nothing_of_the_service_imports_torch(run_python, bundle_path):
    code = f"{IMPORTS}; assert not {set(TRAINING_ONLY)} & set(sys.modules), sorted(sys.modules)"
    finished = run_python("-c", code, VITRINE_BUNDLE=bundle_path)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.skipif("VITRINE_LIGHT_PYTHON" not in os.environ, reason="VITRINE_LIGHT_PYTHON is not set")
def test_torch_is_not_even_there(run_python):
    code = f"import importlib.util as u; print([name for name in {TRAINING_ONLY} if u.find_spec(name)])"
    finished = run_python("-c", code)
    assert (finished.returncode, finished.stdout.strip()) == (0, "[]"), finished.stderr
