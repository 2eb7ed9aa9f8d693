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
        default=None, description="directory of named label sets, NAME.json each; encoded before the service is ready"
    )
    edits: Path | None = Field(
        default=None, description="directory of edits, NAME.json each, beside those that the bundle brings along"
    )
    edit: str | None = Field(
        default=None, description="the edit for requests that name none; it must be there and fit the bundle"
    )
    edit_key_file: Path | None = Field(
        default=None, description="a secret key: edits that are not signed by it are refused; read again by a reload"
    )
    provider: Literal["cpu", "cuda", "tensorrt"] = Field(
        default="cpu", description="where the graphs run; a provider that is not there stops the start"
    )
    precision: Literal["fp32", "int8", "fp16", "auto"] = Field(
        default="fp32",
        description="of the vision graph: int8 for CPUs, fp16 for GPUs, where the bundle has them; auto: the fastest",
    )
    replacement: bool = Field(
        default=True,
        description="offer `explain.matrix`, where the bundle has the replacement graph; opened when first needed",
    )
    sources: bool = Field(
        default=True,
        description="offer source accounts, where the bundle has their graphs; opened when first needed",
    )
    residual: bool = Field(
        default=True,
        description="offer residual SAEs, where the bundle has them; opened when first needed",
    )
    rerun: bool = Field(
        default=True,
        description="take interventions in the running network, where the bundle has its graph; loaded on first use",
    )
    gpu_memory_bytes: NonNegativeInt = Field(default=0, description="the most that CUDA may take; 0: no limit")
    tensorrt_cache: Path | None = Field(
        default=None, description="directory where TensorRT keeps its engines, which take minutes to build"
    )
    workers: PositiveInt = Field(
        default=1, description="processes, each with the whole bundle; one makes the best use of the processors"
    )
    threads: NonNegativeInt = Field(
        default=0, description="threads of one inference; 0: the processors that this container may use, by workers"
    )
    decode_threads: PositiveInt = Field(default=2, description="processes that decode images")
    decode_seconds: PositiveFloat = Field(
        default=10.0,
        allow_inf_nan=False,
        description="processor time for decoding one image, or twice as long by the clock; more is answered 413",
    )
    batch_size: PositiveInt = Field(default=8, description="images in one inference, at most")
    batch_wait_ms: NonNegativeFloat = Field(
        default=0,
        allow_inf_nan=False,
        description="how long the first image waits for a full batch; 0: not at all",
    )
    queue_size: PositiveInt = Field(default=256, description="images waiting; more are answered 429 at once")
    deadline_seconds: PositiveFloat = Field(
        default=30.0, allow_inf_nan=False, description="a request that takes longer is answered 504"
    )
    shutdown_seconds: PositiveFloat = Field(
        default=25.0,
        allow_inf_nan=False,
        description="after SIGTERM, for the requests in hand; a process that is still there then is ended",
    )
    max_body_bytes: PositiveInt = Field(default=16 * 2**20, description="larger request bodies are answered 413")
    max_bytes_in_hand: int = Field(
        default=256 * 2**20,
        ge=2**20,
        le=2**40,
        description="of bodies and unsent answers, a worker; an upload that would take more is answered 429",
    )
    max_header_bytes: int = Field(
        default=32 * 2**10, ge=2**10, le=2**20, description="longer URLs and headers, together, are answered 431"
    )
    header_seconds: float = Field(default=10.0, ge=0.1, le=3_600, description="headers that take longer, likewise 408")
    send_seconds: float = Field(
        default=60.0,
        ge=0.1,
        le=3_600,
        description="a client that has not read, so long after, what was sent to it is disconnected",
    )
    keep_alive_seconds: float = Field(
        default=75.0,
        ge=0.1,
        le=86_400,
        description="a connection without a request stays open; longer than a balancer before it keeps its own",
    )
    max_connections: int = Field(
        default=1_024, ge=1, le=2**20, description="open at once, a worker; for one more, a waiting one is closed"
    )
    max_image_pixels: PositiveInt = Field(default=40_000_000, description="larger images are answered 413, undecoded")
    max_jpeg_pixels: PositiveInt = Field(
        default=200_000_000,
        description="of a JPEG, which is decoded at a half, a quarter or an eighth of its sides beyond 40,000,000",
    )
    max_image_side: PositiveInt = Field(default=16_384, description="pixels a side, likewise")
    max_batch: PositiveInt = Field(default=64, description="images in one `/v1/attribute:batch`; more are answered 413")
    max_labels: PositiveInt = Field(default=2_048, description="labels in one request")
    max_label_chars: PositiveInt = Field(default=256, description="characters in one label, and in one template")
    max_templates: PositiveInt = Field(default=128, description="templates in one request")
    max_prompts: PositiveInt = Field(default=16_384, description="labels times templates in one request")
    max_prompt_chars: PositiveInt = Field(default=1_024, description="characters in a template filled in with a label")
    max_targets: PositiveInt = Field(default=32, description="labels explained in one request")
    max_circuit_nodes: PositiveInt = Field(
        default=512,
        description="features of a CLT followed back in one circuit, of residual SAEs 4 times as many; takes memory",
    )
    max_interventions: PositiveInt = Field(
        default=256, description="in one `/v1/intervene`; and features or patches of a counterfactual"
    )
    max_answer_values: PositiveInt = Field(
        default=2_000_000, description="numbers in one answer, about 10 bytes each: images x targets x details; 413"
    )
    label_cache: PositiveInt = Field(default=65_536, description="label embeddings kept in memory")
    api_keys: SecretStr | None = Field(
        default=None, description="keys, separated by commas, one of which `/v1/` then asks for"
    )
    api_keys_file: Path | None = Field(default=None, description="more of them, one a line; read again by a reload")
    admin_keys: SecretStr | None = Field(default=None, description="keys for `/admin/`, which is not there without")
    admin_keys_file: Path | None = Field(default=None, description="more of them, likewise")
    cors_origins: str | None = Field(
        default=None,
        description="origins whose pages may ask, separated by commas: `https://app.example`; none without",
    )
    log_format: Literal["json", "text"] = Field(default="json", description="of the log lines on standard output")
    log_labels: bool = Field(default=False, description="log what was predicted; images are never logged")
    trace_endpoint: str | None = Field(
        default=None,
        pattern="^https?://.",
        description="OTLP collector, `http://HOST:4318/v1/traces`; needs the extra `tracing`",
    )
    trace_share: float = Field(
        default=1.0, ge=0, le=1, description="of the requests that bring no trace context, those that are traced"
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
            raise ValueError(f"a body may have {body:,} bytes ({PREFIX}MAX_BODY_BYTES), which would be refused forever")
        return limit

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, origins: str | None) -> str | None:
        for origin in _listed(origins):
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"{origin!r} is no origin: write `https://app.example` or `http://localhost:8080`, in lower case, "
                    "without a path or a final slash; `*` is not taken, name them"
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
        yield f"{variable} is no setting; {hint}"
