"""The manifests: rendered, checked against Kubernetes' own schemas, and against what the service needs and forbids."""

import re
import shutil
import subprocess
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml
from kustomize import render

from common import ROOT
from vitrine.service.operations.settings import PREFIX, Settings

DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
OVERLAYS = ("cpu", "gpu")
VERSIONS = ("1.30", "1.37")  # the oldest that we support, and the newest whose schemas are available
IMAGE_VOLUMES = "1.33"  # components/bundle-image needs them
CUSTOM = yaml.safe_load(Path(__file__).with_name("custom-resources.yaml").read_text())
SIGTERM_SECONDS = 30  # service/README.md: the last admitted request is answered in that time


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request):
    return request.param


@pytest.fixture(scope="module")
def objects(overlay):
    """Kind -> the overlay's object of that kind; there is one of each."""
    rendered = render(KUBERNETES / "overlays" / overlay)
    by_kind = {manifest["kind"]: manifest for manifest in rendered}
    assert len(by_kind) == len(rendered)
    return by_kind


@pytest.fixture(scope="module")
def pod(objects):
    return objects["Deployment"]["spec"]["template"]["spec"]


@pytest.fixture(scope="module")
def container(pod):
    (only,) = pod["containers"]
    return only


@pytest.fixture
def make(tmp_path):
    """make(components) -> the objects of the base with these components."""

    def build(*components):
        (tmp_path / "kubernetes").symlink_to(KUBERNETES)
        overlay = tmp_path / "overlay"
        overlay.mkdir()
        spec = {
            "resources": ["../kubernetes/base"],
            "components": [f"../kubernetes/components/{c}" for c in components],
        }
        (overlay / "kustomization.yaml").write_text(yaml.safe_dump(spec))
        return render(overlay)

    return build


def check(manifest, version):
    """Validates against the schema of its kind; unknown fields are errors."""
    if manifest["kind"] in CUSTOM:
        jsonschema.validate(manifest, CUSTOM[manifest["kind"]])
    else:
        kubernetes_validate.validate(manifest, version, strict=True)


def kustomize():
    """The real program's command line, if one is installed that supports components."""
    if shutil.which("kustomize"):
        return ["kustomize", "build"]
    if shutil.which("kubectl"):
        version = subprocess.run(["kubectl", "version", "--client"], capture_output=True, text=True).stdout
        if re.search(r"Kustomize Version: v[5-9]", version):
            return ["kubectl", "kustomize"]
    return None


def test_the_real_kustomize_renders_the_same(overlay):
    command = kustomize()
    if command is None:
        pytest.skip("neither kustomize nor a kubectl with Kustomize 5 is installed")
    folder = KUBERNETES / "overlays" / overlay
    finished = subprocess.run([*command, folder], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr

    def ordered(objects):
        return sorted(objects, key=lambda manifest: manifest["kind"])

    assert ordered(yaml.safe_load_all(finished.stdout)) == ordered(render(folder))


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_takes_every_object(objects, version):
    assert set(objects) == {
        "ConfigMap", "Deployment", "HorizontalPodAutoscaler", "Namespace", "NetworkPolicy", "PodDisruptionBudget",
        "PrometheusRule", "Service", "ServiceMonitor",
    }  # fmt: skip
    for manifest in objects.values():
        check(manifest, version)
        assert manifest["kind"] == "Namespace" or manifest["metadata"]["namespace"] == "vitrine"


@pytest.mark.parametrize(("component", "version"), [("keda", VERSIONS[0]), ("bundle-image", IMAGE_VOLUMES)])
def test_kubernetes_takes_the_other_components(make, component, version):
    for manifest in make(component):
        check(manifest, version)


def test_a_bundle_from_an_image_takes_the_place_of_the_claim(make):
    (deployment,) = (manifest for manifest in make("bundle-image") if manifest["kind"] == "Deployment")
    (bundles,) = (v for v in deployment["spec"]["template"]["spec"]["volumes"] if v["name"] == "bundles")
    assert set(bundles) == {"name", "image"}


def test_the_examples_fit_and_the_secret_has_no_value(pod):
    secret, claim = (
        yaml.safe_load((KUBERNETES / "examples" / name).read_text()) for name in ("secret.yaml", "bundle.yaml")
    )
    for manifest in (secret, claim):
        check(manifest, VERSIONS[0])
    assert not any(secret["stringData"].values())
    assert "data" not in secret
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes["keys"]["secret"]["secretName"] == secret["metadata"]["name"]
    assert volumes["bundles"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]


# Settings


def test_every_setting_is_one_of_the_service_and_has_a_value_that_it_takes(objects, monkeypatch):
    data = objects["ConfigMap"]["data"]
    assert {name.removeprefix(PREFIX).lower() for name in data} <= set(Settings.model_fields)
    assert all(name.startswith(PREFIX) for name in data)
    for name, value in data.items():
        monkeypatch.setenv(name, value)
    assert Settings().workers == 1, "replicas are what scales"


def test_no_other_variable_looks_like_a_setting(pod, container):
    """Unknown settings prevent the start, and Kubernetes would create some for a Service named vitrine."""
    assert pod["enableServiceLinks"] is False
    assert not [variable["name"] for variable in container["env"] if variable["name"].startswith(PREFIX)]
    assert container["envFrom"] == [{"configMapRef": {"name": "vitrine-settings"}}]


def test_what_the_settings_name_is_mounted(objects, pod, container):
    data = objects["ConfigMap"]["data"]
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in mounts.values()} == set(volumes)
    assert mounts[str(Path(data["VITRINE_BUNDLE"]).parent)]["readOnly"]
    keys = Path(data["VITRINE_API_KEYS_FILE"])
    assert "secret" in volumes[mounts[str(keys.parent)]["name"]]
    secret = yaml.safe_load((KUBERNETES / "examples" / "secret.yaml").read_text())
    assert keys.name in secret["stringData"]
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    for path in (environment["BENTOML_HOME"], environment["HOME"], "/tmp"):
        assert "emptyDir" in volumes[mounts[path]["name"]]


def test_the_overlays_differ_in_what_computes(overlay, objects, pod, container):
    gpu = overlay == "gpu"
    assert objects["ConfigMap"]["data"]["VITRINE_PROVIDER"] == ("cuda" if gpu else "cpu")
    assert ("nvidia.com/gpu" in container["resources"]["limits"]) == gpu
    assert any(toleration["key"] == "nvidia.com/gpu" for toleration in pod.get("tolerations", [])) == gpu
    assert container["image"].partition(":")[2] == overlay


def test_the_image_starts_as_the_pod_says(pod, container):
    """The pod gives arguments to the image's entry point, and runs as the image's user, who can read its files."""
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    context = pod["securityContext"]
    assert 'ENTRYPOINT ["vitrine"]' in dockerfile
    assert "command" not in container
    assert container["args"][0] == "serve"
    assert f"USER {context['runAsUser']}:{context['runAsGroup']}" in dockerfile
    assert container["image"].partition(":")[2] in re.findall(r"^FROM \S+ AS (\S+)", dockerfile, re.MULTILINE)


# Lifecycle


def test_probes_leave_time_for_a_bundle_to_load(container):
    startup, liveness, readiness = (container[f"{name}Probe"] for name in ("startup", "liveness", "readiness"))
    assert [probe["httpGet"]["path"] for probe in (startup, liveness, readiness)] == ["/readyz", "/livez", "/readyz"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 600
    assert liveness["periodSeconds"] * liveness["failureThreshold"] >= 120, "a worker is replaced, and loads, meanwhile"
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    for probe in (startup, liveness, readiness):
        assert ports[probe["httpGet"]["port"]] == 3000
    assert container["args"][container["args"].index("--port") + 1] == "3000"
    assert container["args"][container["args"].index("--host") + 1] == "0.0.0.0"


def test_the_grace_period_covers_the_last_requests(pod, container):
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= pause + SIGTERM_SECONDS + 5


def test_a_replica_stays_while_nodes_are_emptied_and_versions_rolled_out(objects):
    assert objects["PodDisruptionBudget"]["spec"]["maxUnavailable"] == 1
    assert objects["HorizontalPodAutoscaler"]["spec"]["minReplicas"] >= 2
    assert "replicas" not in objects["Deployment"]["spec"], "they are the autoscaler's"
    update = objects["Deployment"]["spec"]["strategy"]["rollingUpdate"]
    assert update["maxSurge"] + update["maxUnavailable"] == 1


# Permissions


def test_the_pod_may_do_nothing_but_compute(pod, container):
    """The Pod Security Standard `restricted`, a read-only root file system, and no token."""
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] >= 1000
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert not [volume for volume in pod["volumes"] if "hostPath" in volume]


def test_everything_has_a_bound(pod, container):
    for bound in ("requests", "limits"):
        assert {"cpu", "memory"} <= set(container["resources"][bound])
    assert all("sizeLimit" in volume["emptyDir"] for volume in pod["volumes"] if "emptyDir" in volume)


def test_nothing_goes_out_and_little_comes_in(objects):
    policy = objects["NetworkPolicy"]["spec"]
    assert set(policy["policyTypes"]) == {"Ingress", "Egress"}
    assert policy["egress"] == []
    (ingress,) = policy["ingress"]
    assert ingress["ports"] == [{"port": 3000, "protocol": "TCP"}]
    assert len(ingress["from"]) == 2
    assert all(source["namespaceSelector"]["matchLabels"] for source in ingress["from"])


def test_everything_points_at_the_pods(objects, pod):
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    selectors = [
        objects["Deployment"]["spec"]["selector"]["matchLabels"],
        objects["Service"]["spec"]["selector"],
        objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
        *(spread["labelSelector"]["matchLabels"] for spread in pod["topologySpreadConstraints"]),
    ]
    for selector in selectors:
        assert selector.items() <= labels.items()
    monitored = objects["ServiceMonitor"]["spec"]["selector"]["matchLabels"]
    assert monitored.items() <= objects["Service"]["metadata"]["labels"].items()
    assert (
        objects["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"]
        == objects["Deployment"]["metadata"]["name"]
    )


def test_the_operator_scrapes_as_prometheus_yml_does(objects):
    """Its own label `endpoint` must not replace ours, and the job must have the name that the rules use."""
    (endpoint,) = objects["ServiceMonitor"]["spec"]["endpoints"]
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    (scrape,) = config["scrape_configs"]
    assert endpoint["honorLabels"] is True
    assert endpoint["port"] in [port["name"] for port in objects["Service"]["spec"]["ports"]]
    assert endpoint["path"] == scrape["metrics_path"]
    assert endpoint["interval"] == config["global"]["scrape_interval"]
    assert objects["Service"]["metadata"]["name"] == scrape["job_name"]


def test_the_two_autoscalers_want_the_same(overlay, objects, tmp_path):
    folder = shutil.copytree(KUBERNETES, tmp_path / "kubernetes") / "overlays" / overlay
    kustomization = folder / "kustomization.yaml"
    kustomization.write_text(kustomization.read_text().replace("- ../../components/hpa ", "- ../../components/keda "))
    rendered = {manifest["kind"]: manifest for manifest in render(folder)}
    assert "HorizontalPodAutoscaler" not in rendered, "two would pull at one Deployment"
    scaled = rendered["ScaledObject"]["spec"]
    hpa = objects["HorizontalPodAutoscaler"]["spec"]
    (metric,) = hpa["metrics"]
    assert (scaled["minReplicaCount"], scaled["maxReplicaCount"]) == (hpa["minReplicas"], hpa["maxReplicas"])
    assert scaled["scaleTargetRef"]["name"] == hpa["scaleTargetRef"]["name"]
    assert metric["pods"]["metric"]["name"] in scaled["triggers"][0]["metadata"]["query"]
    assert metric["pods"]["target"]["averageValue"] == scaled["triggers"][0]["metadata"]["threshold"]
    batch = int(objects["ConfigMap"]["data"].get("VITRINE_BATCH_SIZE", Settings.model_fields["batch_size"].default))
    assert float(metric["pods"]["target"]["averageValue"]) == 1.5 * batch
