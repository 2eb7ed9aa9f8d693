"""The settings: each is documented, and wrong ones stop the start with one sentence."""

import re
from pathlib import Path

import pytest

from common import ROOT
from vitrine.service.answers.reload import read_keys
from vitrine.service.operations.bounds import MOST
from vitrine.service.operations.settings import DEMO_BUNDLE, Settings, SettingsError, load_settings

README = ROOT / "service" / "README.md"


def documented():
    """Variable -> default, from the table in service/README.md."""
    rows = re.findall(r"^\| *`(VITRINE_\w+)` *\| *([^|]*?) *\| *([^|]*?) *\|$", README.read_text(), re.MULTILINE)
    assert len({name for name, _, _ in rows}) == len(rows)
    assert all(meaning for _, _, meaning in rows)
    return {name: default.replace("`", "").replace(",", "") for name, default, _ in rows}


def test_the_readme_lists_every_setting_with_its_default():
    defaults = {name: "" if field.default is None else field.default for name, field in Settings.model_fields.items()}
    actual = {f"VITRINE_{name.upper()}": str(default) for name, default in defaults.items()}
    assert actual.pop("VITRINE_BUNDLE") == str(DEMO_BUNDLE)
    assert documented() == actual | {"VITRINE_BUNDLE": "models/demo"}
    assert DEMO_BUNDLE.parts[-2:] == ("models", "demo")


def test_every_number_has_an_upper_bound_with_a_reason():
    numbers = {
        name
        for name, field in Settings.model_fields.items()
        if isinstance(field.default, int | float) and not isinstance(field.default, bool)
    }
    assert numbers <= MOST.keys()
    for name in numbers:
        most, reason = MOST[name]
        assert reason
        assert Settings.model_fields[name].default < most or name == "trace_share"


@pytest.mark.parametrize("name", ["threads", "batch_size", "workers", "deadline_seconds", "max_body_bytes"])
def test_absurd_numbers_are_refused_with_the_reason(monkeypatch, name):
    most, reason = MOST[name]
    monkeypatch.setenv("VITRINE_MAX_BYTES_IN_HAND", str(MOST["max_bytes_in_hand"][0]))  # a body must fit
    monkeypatch.setenv(f"VITRINE_{name.upper()}", str(most))
    assert getattr(load_settings(), name) == most
    monkeypatch.setenv(f"VITRINE_{name.upper()}", "1" + 23 * "0")
    with pytest.raises(SettingsError, match=f"VITRINE_{name.upper()}=.*at most {most:,}, because {reason}"):
        load_settings()


def test_an_empty_path_or_address_is_none(monkeypatch):
    for name in ("BUNDLE", "LABEL_SETS", "TENSORRT_CACHE", "TRACE_ENDPOINT"):
        monkeypatch.setenv(f"VITRINE_{name}", "")
    assert load_settings() == Settings(bundle=DEMO_BUNDLE)


@pytest.mark.parametrize("name", ["API_KEYS", "API_KEYS_FILE", "ADMIN_KEYS", "ADMIN_KEYS_FILE"])
def test_empty_keys_are_refused(monkeypatch, name):
    """Whoever sets them means to restrict access; that must not vanish with a variable's content."""
    monkeypatch.setenv(f"VITRINE_{name}", "")
    with pytest.raises(SettingsError, match=f"VITRINE_{name}"):
        read_keys(load_settings())


def test_every_setting_has_a_description():
    assert all(field.description for field in Settings.model_fields.values())


def test_settings_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("VITRINE_BATCH_SIZE", "3")
    monkeypatch.setenv("VITRINE_BUNDLE", "elsewhere")
    monkeypatch.setenv("BATCH_SIZE", "4")
    settings = load_settings()
    assert (settings.batch_size, settings.bundle) == (3, Path("elsewhere").absolute())


WRONG = {
    "VITRINE_BATCH_SIZE": ["many", "0", "-1", "1.5", ""],
    "VITRINE_THREADS": ["-1"],
    "VITRINE_PROVIDER": ["tpu", "CUDA"],
    "VITRINE_DEADLINE_SECONDS": ["0", "-1", "nan", "inf", "soon"],
    "VITRINE_MAX_BODY_BYTES": ["16MiB", "0"],
    "VITRINE_LABEL_CACHE": ["0"],
    "VITRINE_WORKERS": ["0"],
    "VITRINE_BATCH_WAIT_MS": ["-1", "inf"],
    "VITRINE_LOG_FORMAT": ["xml"],
    "VITRINE_LOG_LABELS": ["perhaps"],
    "VITRINE_TRACE_ENDPOINT": ["collector:4318"],
    "VITRINE_TRACE_SHARE": ["1.1", "-0.1", "nan"],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in WRONG.items() for value in values])
def test_a_wrong_value_is_refused_by_name(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=f"{name}='{re.escape(value)}'"):
        load_settings()


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("VITRINE_QUEUE_SZE", "did you mean VITRINE_QUEUE_SIZE?"),
        ("VITRINE_APIKEYS", "did you mean VITRINE_API_KEYS?"),
        ("VITRINE_XYZZY", "service/README.md lists them"),
    ],
)
def test_a_name_that_is_no_setting_is_refused_with_the_nearest_one(monkeypatch, name, hint):
    """Otherwise it would be ignored silently, even the name of an API key setting."""
    monkeypatch.setenv(name, "1")
    with pytest.raises(SettingsError, match=rf"{name} is not a setting.*{re.escape(hint)}"):
        load_settings()


def test_keys_are_not_shown_with_the_settings(monkeypatch):
    monkeypatch.setenv("VITRINE_API_KEYS", "a-secret")
    assert "a-secret" not in repr(load_settings()) + str(load_settings().model_dump())


def test_all_wrong_values_are_named_at_once(monkeypatch):
    monkeypatch.setenv("VITRINE_BATCH_SIZE", "many")
    monkeypatch.setenv("VITRINE_PROVIDER", "tpu")
    with pytest.raises(SettingsError, match=r"VITRINE_PROVIDER.*VITRINE_BATCH_SIZE"):
        load_settings()


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"VITRINE_BATCH_SIZE": "many"}, "VITRINE_BATCH_SIZE"),
        ({"VITRINE_PROVIDER": "cuda"}, "VITRINE_PROVIDER"),
        ({"VITRINE_DEADLINE_SECONDS": "inf"}, "VITRINE_DEADLINE_SECONDS"),
        ({"VITRINE_BUNDLE": "/nowhere"}, "/nowhere"),
        ({"VITRINE_API_KEYS_FILE": "/nowhere"}, "VITRINE_API_KEYS_FILE=/nowhere cannot be read"),
        ({"VITRINE_ADMIN_KEYS": " , "}, "VITRINE_ADMIN_KEYS"),
        ({"VITRINE_BATCHSIZE": "1"}, "did you mean VITRINE_BATCH_SIZE?"),
    ],
    ids=["no number", "no cuda", "infinite", "no bundle", "no key file", "no key", "no setting"],
)
def test_wrong_settings_stop_serve_with_one_message(run_python, bundle_path, environment, named):
    finished = run_python("-m", "vitrine", "serve", "--port", 1, **{"VITRINE_BUNDLE": bundle_path, **environment})
    assert finished.returncode == 1
    assert finished.stderr.startswith("error: ")
    assert named in finished.stderr
    assert "Traceback" not in finished.stderr + finished.stdout


def test_traces_without_an_exporter_stop_the_start(run_python, bundle_path):
    if run_python("-c", "import opentelemetry.exporter.otlp.proto.http").returncode == 0:
        pytest.skip("the exporter is installed beside the service")
    environment = {"VITRINE_BUNDLE": bundle_path, "VITRINE_TRACE_ENDPOINT": "http://collector/v1/traces"}
    finished = run_python("-m", "vitrine", "serve", "--port", 1, **environment)
    assert finished.returncode == 1
    assert finished.stderr.startswith("error: VITRINE_TRACE_ENDPOINT=")
    assert "vitrine[tracing]" in finished.stderr


def test_a_body_must_fit_into_the_bytes_in_hand(monkeypatch):
    monkeypatch.setenv("VITRINE_MAX_BODY_BYTES", str(300 * 2**20))
    with pytest.raises(SettingsError, match=r"VITRINE_MAX_BYTES_IN_HAND=268435456: a body may have 314,572,800 bytes"):
        load_settings()
    monkeypatch.setenv("VITRINE_MAX_BYTES_IN_HAND", str(300 * 2**20))
    assert load_settings().max_bytes_in_hand == 300 * 2**20
