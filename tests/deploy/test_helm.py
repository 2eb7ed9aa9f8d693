"""The Helm chart, rendered by Helm itself: it is what the Kustomize overlays are, so that they cannot drift apart."""

import json
import shutil
import subprocess

import pytest
import yaml
from kustomize import render as kustomized
from test_kubernetes import IMAGE_VOLUMES, KUBERNETES, VERSIONS, check

from common import ROOT

CHART = ROOT / "deploy" / "helm" / "vitrine"


@pytest.fixture
def helm(tmp_path):
    """helm(values, file) -> {kind: object} of the chart with these values; fails with Helm's message.

    By the program where it is installed, else by helm-python-sdk, which has Helm's own library in it.
    """

    def render(values=None, file=None, namespace="vitrine"):
        values = dict(values or {})
        if shutil.which("helm"):
            (tmp_path / "values.json").write_text(json.dumps(values))
            command = ["helm", "template", "vitrine", CHART, "--namespace", namespace, "--kube-version", VERSIONS[-1]]
            command += ["--values", CHART / file] if file else []
            command += ["--values", tmp_path / "values.json"]
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
            if done.returncode:
                raise ValueError(done.stderr)
            text = done.stdout
        else:
            helm_python = pytest.importorskip("helm_python", reason="neither helm nor helm-python-sdk is installed")
            if file:
                values = yaml.safe_load((CHART / file).read_text()) | values
            with helm_python.Chart.load(CHART) as chart:
                try:
                    chart.validate_schema(values)
                    text = "\n---\n".join(chart.render(values, name="vitrine", namespace=namespace).values())
                except helm_python.HelmError as error:
                    raise ValueError(str(error)) from error
        objects = [one for one in yaml.safe_load_all(text) if one]
        by_kind = {one["kind"]: one for one in objects}
        assert len(by_kind) == len(objects)
        return by_kind

    return render


def by_kind(objects):
    """Without the namespace, which Helm's --create-namespace makes."""
    return {one["kind"]: one for one in objects if one["kind"] != "Namespace"}


@pytest.mark.parametrize(("overlay", "file"), [("cpu", None), ("gpu", "values-gpu.yaml")])
def test_the_chart_is_the_overlay(helm, overlay, file):
    rendered, expected = helm(file=file), by_kind(kustomized(KUBERNETES / "overlays" / overlay))
    assert rendered.keys() == expected.keys()
    for kind, manifest in expected.items():
        assert rendered[kind] == manifest, kind
    for version in VERSIONS:
        for manifest in rendered.values():
            check(manifest, version)


def test_keda_takes_the_place_of_the_autoscaler(helm):
    rendered = helm({"autoscaling": {"kind": "keda"}})
    expected = yaml.safe_load((KUBERNETES / "components" / "keda" / "scaledobject.yaml").read_text())
    expected["metadata"]["namespace"] = "vitrine"
    assert rendered["ScaledObject"] == expected
    assert "HorizontalPodAutoscaler" not in rendered
    check(rendered["ScaledObject"], VERSIONS[0])
    queries = [
        one["metadata"]["query"]
        for one in helm({"autoscaling": {"kind": "keda"}}, namespace="other")["ScaledObject"]["spec"]["triggers"]
    ]
    assert all('namespace="other"' in query for query in queries)


def test_a_bundle_from_an_image(helm):
    image = {"reference": "vitrine-bundle:0.1.0", "pullPolicy": "IfNotPresent"}
    deployment = helm({"bundles": {"persistentVolumeClaim": None, "image": image}})["Deployment"]
    check(deployment, IMAGE_VOLUMES)
    assert deployment["spec"]["template"]["spec"]["volumes"][0] == {"name": "bundles", "image": image}


def test_monitoring_can_be_left_out(helm):
    assert not {"ServiceMonitor", "PrometheusRule"} & helm({"monitoring": {"enabled": False}}).keys()


@pytest.mark.parametrize(
    ("values", "named"),
    [({"autoscaling": {"kind": "both"}}, "kind"), ({"settings": {"OTHER": "x"}}, "OTHER"), ({"imag": {}}, "imag"),
     ({"settings": {"VITRINE_WORKERS": 1}}, "VITRINE_WORKERS"), ({"keysSecret": ""}, "keysSecret")],
)  # fmt: skip
def test_wrong_values_are_refused(helm, values, named):
    with pytest.raises(ValueError, match=named):
        helm(values)


def test_every_value_is_in_the_schema():
    values, schema = (yaml.safe_load((CHART / name).read_text()) for name in ("values.yaml", "values.schema.json"))
    assert values.keys() <= schema["properties"].keys()
    for name, value in values.items():
        if "properties" in schema["properties"][name]:
            assert value.keys() == schema["properties"][name]["properties"].keys(), name
