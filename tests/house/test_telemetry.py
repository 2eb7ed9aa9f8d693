"""Libraries that would report to their makers are told not to, before they are imported, wherever that is."""

import ast
import os

import pytest

from common import ROOT
from vitrine import telemetry

REPORTING = {"bentoml", "datasets", "huggingface_hub", "onnxruntime", "open_clip", "ray", "wandb"}


def test_it_is_off_here():
    assert {name: os.environ[name] for name in telemetry.OFF} == telemetry.OFF


@pytest.mark.parametrize("name", telemetry.OFF)
def test_only_a_clear_consent_turns_it_on(monkeypatch, name):
    for unclear in ("", " ", "perhaps", telemetry.OFF[name], telemetry.OFF[name].upper(), "yes please"):
        monkeypatch.setenv(name, unclear)
        telemetry.switch_off()
        assert os.environ[name] == telemetry.OFF[name]
    consent = "True" if telemetry.OFF[name] in ("0", "false") else "0"
    monkeypatch.setenv(name, consent)
    telemetry.switch_off()
    assert os.environ[name] == consent


def test_containers_have_it_for_processes_without_vitrine():
    for file in ("deploy/Dockerfile", "deploy/kubernetes/base/deployment.yaml", "bentofile.yaml"):
        text = (ROOT / file).read_text()
        assert "ORT_DISABLE_TELEMETRY" in text
        assert "BENTOML_DO_NOT_TRACK" in text


@pytest.mark.parametrize("path", sorted((ROOT / "loadtests").glob("*.py")), ids=lambda path: path.name)
def test_scripts_import_vitrine_before_these_libraries(path):
    ours = False
    for node in ast.parse(path.read_text()).body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in (name.split(".")[0] for name in names):
            ours |= name == "vitrine"
            assert ours or name not in REPORTING, name
