"""deploy/compose.yaml: the files it names exist, and the services find each other."""

import pytest
import yaml
from dockerfile import read

from common import ROOT

DEPLOY = ROOT / "deploy"


@pytest.fixture(scope="module")
def services():
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]


def test_every_file_that_is_mounted_is_there(services):
    sources = [
        volume.replace("${BUNDLE:-", "").replace("}", "").split(":")[0]
        for service in services.values()
        for volume in service["volumes"]
    ]
    folders = [DEPLOY / source for source in sources if source.startswith(".")]
    assert len(folders) == 4
    assert [folder for folder in folders if not folder.is_dir()] == []


def test_the_image_is_the_dockerfiles(services):
    build = services["vitrine"]["build"]
    dockerfile = DEPLOY / build["context"] / build["dockerfile"]
    assert build["target"] in [stage.name for stage in read(dockerfile.read_text())[1]]


def test_prometheus_and_grafana_ask_services_of_these_names(services):
    scraped = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    targets = [target for job in scraped for static in job["static_configs"] for target in static["targets"]]
    assert targets == ["vitrine:3000"]
    (source,) = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert {"vitrine", "prometheus"} < services.keys()


def test_dashboards_are_mounted_where_grafana_looks(services):
    (provider,) = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/vitrine.yml").read_text())["providers"]
    assert f"./grafana:{provider['options']['path']}:ro" in services["grafana"]["volumes"]


def test_the_service_writes_nowhere_but_in_tmp(services):
    service = services["vitrine"]
    assert service["read_only"]
    assert service["tmpfs"] == "/tmp"
    assert all(volume.endswith(":ro") for volume in service["volumes"])
