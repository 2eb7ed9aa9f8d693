"""`make serve`, with a CLIP or for a GPU: the commands that it comes to, without running them."""

import subprocess

import pytest

from common import ROOT


def dry_run(*variables):
    """What make would run."""
    command = ["make", "--dry-run", "serve", "PYTHON=python3", *variables]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    return " ".join(done.stdout.replace("\\\n", " ").split())


@pytest.mark.parametrize(
    ("variables", "exported", "served"),
    [
        (
            ["CLIP=ViT-B-32/openai"],
            "export --clip ViT-B-32 --weights openai --out build/clip/ViT-B-32-openai;",
            "--bundle build/clip/ViT-B-32-openai",
        ),
        (
            ["CLIP=hf-hub:org/model", "IMAGES=photos", "LABELS=names.txt"],
            "export --clip hf-hub:org/model --images photos --labels-file names.txt --out build/clip/hf-hub-org-model;",
            "--bundle build/clip/hf-hub-org-model",
        ),
    ],
)
def test_a_clip_is_announced_exported_and_served(variables, exported, served):
    commands = dry_run(*variables)
    assert exported in commands
    assert commands.index('echo "Once:') < commands.index(exported) < commands.index(served)


def test_without_a_clip_only_the_light_environment_is_needed():
    commands = dry_run()
    assert ".venv-dev" not in commands
    assert "--bundle" not in commands


@pytest.mark.parametrize("runtime", ["cpu", "gpu"])
def test_for_a_gpu_cudas_libraries_are_installed_and_its_provider_used(runtime):
    """In an environment that is not there yet: `--always-make` prints how it is made."""
    commands = dry_run(f"RUNTIME={runtime}", "--always-make")
    assert f"--editable '.[{runtime}]'" in commands
    assert ("'onnxruntime-gpu[cuda,cudnn]'" in commands) == (runtime == "gpu")
    assert ("VITRINE_PROVIDER=${VITRINE_PROVIDER:-cuda}" in commands) == (runtime == "gpu")
