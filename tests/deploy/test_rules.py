"""Recording and alerting rules: valid, tested to fire and to stay silent, and the same in both places."""

import re
import subprocess

import pytest
import yaml

from common import ROOT
from vitrine.service.operations import metrics

DEPLOY = ROOT / "deploy"
RULES = DEPLOY / "prometheus" / "rules.yml"
TESTS = DEPLOY / "prometheus" / "rules.test.yml"
COMPONENTS = DEPLOY / "kubernetes" / "components"


@pytest.fixture(scope="module")
def groups():
    return yaml.safe_load(RULES.read_text())["groups"]


@pytest.fixture(scope="module")
def rules(groups):
    return [rule for group in groups for rule in group["rules"]]


@pytest.fixture(scope="module")
def alerts(rules):
    return {rule["alert"]: rule for rule in rules if "alert" in rule}


@pytest.mark.parametrize(
    "arguments",
    [("check", "rules", "--lint=all", "--lint-fatal", RULES), ("check", "config", RULES.with_name("prometheus.yml"))],
)
def test_prometheus_takes_the_files(find_program, arguments):
    finished = subprocess.run([find_program("promtool"), *arguments], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_every_alert_fires_when_it_must_and_is_silent_when_it_must(find_program):
    finished = subprocess.run([find_program("promtool"), "test", "rules", TESTS], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr


def test_no_alert_is_left_out_of_the_tests(alerts):
    fired, silence_tested = set(), False
    for test in yaml.safe_load(TESTS.read_text())["tests"]:
        for check in test["promql_expr_test"]:
            silence_tested |= check["expr"] == 'ALERTS{alertstate="firing"}' and check["exp_samples"] == []
            for sample in check["exp_samples"]:
                fired |= set(re.findall('alertname="([^"]*)"', sample["labels"]))
    assert fired == set(alerts)
    assert silence_tested, "that nothing fires at all is asked too"


def test_every_alert_says_what_happened_and_what_to_do(alerts):
    for name, alert in alerts.items():
        assert name.startswith("Vitrine")
        assert alert["labels"]["severity"] in ("critical", "warning")
        assert set(alert["annotations"]) == {"summary", "description", "runbook"}, name
        assert alert["annotations"]["description"].endswith("."), name
        assert alert["annotations"]["runbook"].endswith("."), name


def test_rules_and_autoscalers_name_series_that_the_service_has(rules):
    """promtool cannot check this: a misspelt series is simply one that never exists."""
    existing = {rule["record"] for rule in rules if "record" in rule} | series()
    expressions = [rule["expr"] for rule in rules]
    keda = yaml.safe_load((COMPONENTS / "keda" / "scaledobject.yaml").read_text())
    expressions += [trigger["metadata"]["query"] for trigger in keda["spec"]["triggers"]]
    hpa = yaml.safe_load((COMPONENTS / "hpa" / "horizontalpodautoscaler.yaml").read_text())
    expressions += [metric["pods"]["metric"]["name"] for metric in hpa["spec"]["metrics"]]
    for expression in expressions:
        assert set(re.findall(r"\bvitrine[_:][\w:]*", expression)) <= existing, expression


def series():
    """The name of every series of vitrine.service.operations.metrics, as Prometheus stores it."""
    names = set()
    for collector in vars(metrics).values():
        if isinstance(collector, metrics.Histogram):
            names |= {f"{collector._name}_{part}" for part in ("bucket", "sum", "count")}
        elif isinstance(collector, metrics.Counter):
            names.add(f"{collector._name}_total")
        elif isinstance(collector, metrics.Gauge):
            names.add(collector._name)
    return names


def test_kubernetes_gets_the_same_rules(groups):
    assert yaml.safe_load((COMPONENTS / "monitoring" / "prometheusrule.yaml").read_text())["spec"]["groups"] == groups
