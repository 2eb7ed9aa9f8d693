"""Every setting of the service, read from the environment (`VITRINE_<NAME>`). service/README.md lists them all."""

from __future__ import annotations

import difflib
import importlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from vitrine.models.errors import VitrineError
from vitrine.models.images.decode import ImageLimits
from vitrine.service.operations.bounds import check_bound

PREFIX = "VITRINE_"
OTHER_VARIABLES = (
    "DATA",
    "LIGHT_PYTHON",
    "REQUIRE_BROWSER",
    "REQUIRE_CHROOT",
    "REQUIRE_PROMETHEUS",
    "REQUIRE_STRACE",
)  # variables with our prefix that belong to training and to the tests
# scheme, host (a name or an address) and port, as browsers write them in the header Origin (RFC 6454, 6.2)
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(:\d{1,5})?")
DEMO_BUNDLE = Path(__file__).resolve().parents[2] / "models" / "demo"


class SettingsError(VitrineError):
    """A setting has a wrong value; the message names the variable."""


class Settings(BaseSettings):
    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore")

    bundle: Path = Field(default=DEMO_BUNDLE, description="directory of the bundle to serve")
    label_sets: Path | None = Field(
        default=None,
        description="directory of named label sets, one NAME.json each; they are encoded before the service is ready",
    )
    edits: Path | None = Field(
        default=None, description="directory of edits, one NAME.json each, in addition to the bundle's own edits"
    )
    edit: str | None = Field(
        default=None, description="the edit for requests that do not name one; it must exist and fit the bundle"
    )
    edit_key_file: Path | None = Field(
        default=None,
        description="file with a secret key: edits that are not signed with it are refused; a reload reads it again",
    )
    provider: Literal["cpu", "cuda", "tensorrt"] = Field(
        default="cpu", description="where the graphs run; the service does not start if the provider is not available"
    )
    precision: Literal["fp32", "int8", "fp16", "auto"] = Field(
        default="fp32",
        description="precision of the vision graph: int8 (CPUs) and fp16 (GPUs) if the bundle has them; auto: the "
        "fastest",
    )
    replacement: bool = Field(
        default=True,
        description="offer `explain.matrix` if the bundle has the replacement graph; it is opened on first use",
    )
    sources: bool = Field(
        default=True,
        description="offer source accounts if the bundle has their graphs; they are opened on first use",
    )
    residual: bool = Field(
        default=True,
        description="offer residual SAEs if the bundle has them; they are opened on first use",
    )
    rerun: bool = Field(
        default=True,
        description="offer interventions in the running network if the bundle has its graph; it is opened on first use",
    )
    gpu_memory_bytes: NonNegativeInt = Field(
        default=0, description="maximum GPU memory for CUDA, in bytes; 0: no limit"
    )
    tensorrt_cache: Path | None = Field(
        default=None, description="directory in which TensorRT keeps its engines, which take minutes to build"
    )
    workers: PositiveInt = Field(
        default=1,
        description="number of worker processes, each with the complete bundle; one makes the best use of the "
        "processors",
    )
    threads: NonNegativeInt = Field(
        default=0,
        description="threads per inference; 0: the number of processors that this container may use, divided by the "
        "workers",
    )
    decode_threads: PositiveInt = Field(default=2, description="number of processes that decode images")
    decode_seconds: PositiveFloat = Field(
        default=10.0,
        allow_inf_nan=False,
        description="maximum processor time to decode one image (elapsed time: twice as much); beyond it the answer "
        "is 413",
    )
    batch_size: PositiveInt = Field(default=8, description="maximum number of images per inference")
    batch_wait_ms: NonNegativeFloat = Field(
        default=0,
        allow_inf_nan=False,
        description="how long the first image waits for a full batch; 0: it does not wait",
    )
    queue_size: PositiveInt = Field(
        default=256, description="maximum number of waiting images; beyond it the answer is 429 at once"
    )
    deadline_seconds: PositiveFloat = Field(
        default=30.0, allow_inf_nan=False, description="maximum time of a request; beyond it the answer is 504"
    )
    shutdown_seconds: PositiveFloat = Field(
        default=25.0,
        allow_inf_nan=False,
        description="time after SIGTERM to finish the current requests; a process that still runs then is killed",
    )
    max_body_bytes: PositiveInt = Field(
        default=16 * 2**20, description="maximum size of a request body, in bytes; beyond it the answer is 413"
    )
    max_bytes_in_hand: int = Field(
        default=256 * 2**20,
        ge=2**20,
        le=2**40,
        description="maximum bytes of all request bodies and unsent answers per worker; an upload beyond it is "
        "answered 429",
    )
    max_header_bytes: int = Field(
        default=32 * 2**10,
        ge=2**10,
        le=2**20,
        description="maximum size of URL and headers together, in bytes; beyond it the answer is 431",
    )
    header_seconds: float = Field(
        default=10.0, ge=0.1, le=3_600, description="maximum time to receive the headers; beyond it the answer is 408"
    )
    send_seconds: float = Field(
        default=60.0,
        ge=0.1,
        le=3_600,
        description="a client that does not read its answer for this long is disconnected",
    )
    keep_alive_seconds: float = Field(
        default=75.0,
        ge=0.1,
        le=86_400,
        description="how long a connection without a request stays open; set it longer than your load balancer's idle "
        "timeout",
    )
    max_connections: int = Field(
        default=1_024,
        ge=1,
        le=2**20,
        description="maximum number of open connections per worker; beyond it an idle one is closed for each new one",
    )
    max_image_pixels: PositiveInt = Field(
        default=40_000_000,
        description="maximum number of pixels of an image; beyond it the answer is 413, before decoding",
    )
    max_jpeg_pixels: PositiveInt = Field(
        default=200_000_000,
        description="maximum number of pixels of a JPEG; beyond 40,000,000 it is decoded at 1/2, 1/4 or 1/8 of its "
        "width and height",
    )
    max_image_side: PositiveInt = Field(
        default=16_384, description="maximum width and height of an image; beyond it the answer is 413, before decoding"
    )
    max_batch: PositiveInt = Field(
        default=64, description="maximum number of images in one `/v1/attribute:batch`; beyond it the answer is 413"
    )
    max_labels: PositiveInt = Field(default=2_048, description="maximum number of labels in one request")
    max_label_chars: PositiveInt = Field(
        default=256, description="maximum number of characters in one label, and in one template"
    )
    max_templates: PositiveInt = Field(default=128, description="maximum number of templates in one request")
    max_prompts: PositiveInt = Field(default=16_384, description="maximum of labels times templates in one request")
    max_prompt_chars: PositiveInt = Field(
        default=1_024, description="maximum number of characters in a template filled in with a label"
    )
    max_targets: PositiveInt = Field(default=32, description="maximum number of labels explained in one request")
    max_circuit_nodes: PositiveInt = Field(
        default=512,
        description="maximum number of features of a CLT to follow back in one circuit (residual SAEs: 4 times as "
        "many); costs memory",
    )
    max_interventions: PositiveInt = Field(
        default=256,
        description="maximum number of interventions in one `/v1/intervene`, and of features or patches in a "
        "counterfactual",
    )
    max_answer_values: PositiveInt = Field(
        default=2_000_000,
        description="maximum of numbers in one answer (images x targets x details), 10 bytes each; beyond it the "
        "answer is 413",
    )
    label_cache: PositiveInt = Field(default=65_536, description="number of label embeddings kept in memory")
    api_keys: SecretStr | None = Field(
        default=None, description="keys, separated by commas; if set, requests to `/v1/` must send one of them"
    )
    api_keys_file: Path | None = Field(
        default=None, description="file with more of these keys, one per line; a reload reads it again"
    )
    admin_keys: SecretStr | None = Field(
        default=None, description="keys for `/admin/`, which only exists if they are set"
    )
    admin_keys_file: Path | None = Field(
        default=None, description="file with more of these keys, one per line; a reload reads it again"
    )
    cors_origins: str | None = Field(
        default=None,
        description="origins whose pages may send requests, separated by commas: `https://app.example`; default: no "
        "other origin",
    )
    log_format: Literal["json", "text"] = Field(
        default="json", description="format of the log lines on standard output"
    )
    log_labels: bool = Field(default=False, description="log the predicted labels; images are never logged")
    trace_endpoint: str | None = Field(
        default=None,
        pattern="^https?://.",
        description="URL of an OTLP collector, `http://HOST:4318/v1/traces`; requires the extra `tracing`",
    )
    trace_share: float = Field(
        default=1.0, ge=0, le=1, description="share of the requests without a trace context that are traced"
    )

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, values: dict[str, Any]) -> dict[str, Any]:
        """An empty path or address, as compose files make them, is none. Keys stay, and are refused: access that should
        be restricted would be open."""
        defaults = {name: field.default for name, field in cls.model_fields.items() if "key" not in name}
        absent = {name for name, default in defaults.items() if default is None or isinstance(default, Path)}
        return {name: value for name, value in values.items() if value != "" or name not in absent}

    @field_validator("*")
    @classmethod
    def _check_bound(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, int | float) and info.field_name:
            check_bound(info.field_name, value)
        return value

    @field_validator("max_bytes_in_hand")
    @classmethod
    def _check_that_a_body_fits(cls, limit: int, others: ValidationInfo) -> int:
        if limit < (body := others.data.get("max_body_bytes", 0)):
            raise ValueError(
                f"a body may have {body:,} bytes ({PREFIX}MAX_BODY_BYTES), and would always be refused; set at least "
                "this many"
            )
        return limit

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, origins: str | None) -> str | None:
        for origin in _listed(origins):
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"{origin!r} is not an origin; write `https://app.example` or `http://localhost:8080`, in lower "
                    "case, without a path or a final slash; `*` is not accepted, list the origins"
                )
        return origins

    @field_validator("trace_endpoint")
    @classmethod
    def _check_exporter(cls, endpoint: str | None) -> str | None:
        if endpoint:
            try:
                importlib.import_module("opentelemetry.exporter.otlp.proto.http")
            except ModuleNotFoundError as error:
                message = "the OpenTelemetry exporter is not installed: pip install 'vitrine[tracing]'"
                raise ValueError(message) from error
        return endpoint

    @property
    def capacity(self) -> int:
        """Most images in flight: being decoded, waiting or inferred."""
        return self.queue_size + self.batch_size

    @property
    def origins(self) -> tuple[str, ...]:
        """The origins whose pages may ask, as browsers send them."""
        return _listed(self.cors_origins)

    @property
    def image_limits(self) -> ImageLimits:
        return ImageLimits(self.max_image_pixels, self.max_image_side, self.max_jpeg_pixels)

    @property
    def images_per_request(self) -> int:
        """Most images in one request: a batch larger than `capacity` would be refused forever."""
        return min(self.max_batch, self.capacity)


def load_settings(**given: Any) -> Settings:
    """Settings from the environment, their paths absolute. Raises `SettingsError` naming every wrong or unknown
    variable. given: settings by their names in lower case, which come before the environment's."""
    variables = [*(name for name in os.environ if name.startswith(PREFIX)), *(PREFIX + name.upper() for name in given)]
    if unknown := [name for name in variables if not _is_known(name)]:
        raise SettingsError("; ".join(_describe_unknown(unknown)))
    try:
        settings = Settings(**given)
    except ValidationError as error:
        problems = [
            f"{PREFIX}{str(e['loc'][0]).upper()}={e['input']!r}: {e['msg'].removeprefix('Value error, ')}"
            for e in error.errors()
        ]
        raise SettingsError("; ".join(problems)) from error
    # Workers run in another directory. Links stay links: a reload resolves them again.
    return settings.model_copy(update={name: path.absolute() for name, path in _paths(settings)})


def write_paths_to_environment(settings: Settings) -> None:
    """So that child processes read the same paths, wherever they run."""
    for name, path in _paths(settings):
        os.environ[f"{PREFIX}{name.upper()}"] = str(path.absolute())


def _listed(text: str | None) -> tuple[str, ...]:
    return tuple(filter(None, (entry.strip() for entry in (text or "").split(","))))


def _paths(settings: Settings) -> list[tuple[str, Path]]:
    return [(name, value) for name, value in settings if isinstance(value, Path)]


def _is_known(variable: str) -> bool:
    name = variable.removeprefix(PREFIX)
    return name in OTHER_VARIABLES or name.lower() in Settings.model_fields


def _describe_unknown(variables: Iterable[str]) -> Iterable[str]:
    names = [name.upper() for name in Settings.model_fields]
    for variable in variables:
        matches = difflib.get_close_matches(variable.removeprefix(PREFIX).upper(), names, 1)
        hint = f"did you mean {PREFIX}{matches[0]}?" if matches else "service/README.md lists them"
        yield f"{variable} is not a setting; {hint}"
