"""gpu.json as Markdown, for RESULTS.md and deploy/CAPACITY.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

Row = dict[str, Any]
TRIAL = "**Small shapes on processors, to try the script: no figure here is from a GPU.**"


def markdown(result: dict[str, Any]) -> str:
    """The machine, a table for every step that measured something, and what became of the others."""
    lines = [f"Measured {result['begun'][:10]}, code {result['code']}, on: {_machine(result['machine'])}.", ""]
    if result["provider"] == "cpu":
        lines = [TRIAL, "", *lines]
    for name, step in result["steps"].items():
        if step["rows"]:
            lines += [f"### {name} ({step['seconds']:.0f} s)", "", *TABLES[name.split("-")[0]](step["rows"]), ""]
    for name, step in result["steps"].items():
        if step["state"] != "done":
            lines.append(f"- {name}: {step['state']}: {step['reason']}")
    return "\n".join(lines).rstrip()


def _machine(machine: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    single = ", ".join(f"{name} {value}" for name, value in machine.items() if name != "packages")
    return f"{single}; {packages}"


def _table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    headings = list(headings)
    marks = ["---"] + ["---:"] * (len(headings) - 1)
    return [f"| {' | '.join(cells)} |" for cells in (headings, marks, *rows)]


def _number(value: float | None, form: str = ".1f") -> str:
    return "–" if value is None else format(value, form)


def _doctor(rows: list[Row]) -> list[str]:
    return ["```", *(line.rstrip() for row in rows for line in row["output"].strip("\n").splitlines()), "```"]


def _parity(rows: list[Row]) -> list[str]:
    """Differences in logits; shares as percentages."""
    headings = ("graph", "top-1", "logit", "row", "remainder", "sources", "cosine of ledgers", "top features")
    cells = []
    for row in rows:
        tf32 = "" if row["precision"] != "fp32" or row["provider"].startswith("CPU") else ", TF32 off"
        name = f"{row['bundle']} {row['precision']}{', TF32' if row['tf32'] else tf32}"
        worst = (_number(row[key], ".1e") for key in ("logit", "row", "remainder", "sources"))
        cells.append(
            [name, f"{row['top1']:.1%}", *worst, f"{row['ledger_cosine']:.5f}", _number(row["top_features"], ".1%")]
        )
    found = _table(
        [*headings, "nodes elsewhere"], [[*row, _elsewhere(of)] for row, of in zip(cells, rows, strict=True)]
    )
    return [
        *found,
        "",
        f"Largest differences from float32 on the CPU, in logits, on {rows[0]['images']} generated pictures.",
    ]


def _elsewhere(row: Row) -> str:
    elsewhere: dict[str, int] = row["nodes"]["elsewhere"]
    total = sum(row["nodes"]["counts"].values())
    most = sorted(elsewhere.items(), key=lambda pair: -pair[1])[:3]
    named = ", ".join(f"{count} {name}" for name, count in most)
    return f"{sum(elsewhere.values())} of {total}" + (f": {named}" if named else "")


def _bundle(rows: list[Row]) -> list[str]:
    return [f"Random weights, shape {row['shape']}, F = {row['features']:,}, k = {row['k']}." for row in rows]


def _engine(rows: list[Row]) -> list[str]:
    batches = sorted({row["batch"] for row in rows})
    names = list(dict.fromkeys((row["precision"], row["variant"]) for row in rows))
    found = {(row["precision"], row["variant"], row["batch"]): row for row in rows}

    def cell(precision: str, variant: str, batch: int) -> str:
        row = found.get((precision, variant, batch))
        return f"{row['median_ms']:.2f} ({row['ratio_to_plain']:.2f})" if row else "–"

    cells = [
        [f"{variant}, {precision}", *(cell(precision, variant, batch) for batch in batches)]
        for precision, variant in names
    ]
    headings = ["", *(f"batch {batch}, ms (to plain)" for batch in batches)]
    return [
        *_table(headings, cells),
        "",
        "Medians; in brackets, medians of the rounds' ratios to plain CLIP in the same precision.",
    ]


def _service(rows: list[Row]) -> list[str]:
    headings = ["workers", "offered/s", "answered/s", "429", "failed", "p50 ms", "p95 ms", "p99 ms", "GPU busy"]
    headings += ["GPU W", "GPU GiB", "ms of GPU an image", "ms of processors an answer", "processors", "client's"]
    cells, knees = [], []
    for row in rows:
        if "rate" not in row:
            knees.append(
                f"{row['workers']} worker{'s' * (row['workers'] > 1)}: knee {row['knee'] or 'below the first rate'}/s."
            )
            continue
        busy, memory = row.get("gpu_busy"), row.get("gpu_bytes")
        an_image = busy / row["answered"] * 1e3 if busy is not None and row["answered"] else None
        cells.append(
            [str(row["workers"]), str(row["rate"]), _number(row["answered"]), str(row["refused"]), str(row["failed"])]
            + [_number(row[f"p{at}_ms"]) for at in (50, 95, 99)]
            + [_number(busy, ".0%"), _number(row.get("gpu_watts"), ".0f"), _number(memory and memory / 2**30)]
            + [_number(an_image, ".2f"), _number(row["service_ms_an_answer"])]
            + [_number(row["service_processors"]), _number(row["client_processors"])]
        )
    return [
        *_table(headings, cells),
        "",
        *knees,
        "GPU busy: share of the time in which any kernel ran.",
    ]


def _training(rows: list[Row]) -> list[str]:
    headings = (
        "",
        "tokens a step",
        "sparse ms, with Adam",
        "tokens/s",
        "GiB",
        "of peak",
        "dense/sparse, with Adam",
        "dense GiB",
    )
    cells = []
    for row in rows:
        took = row.get("sparse_seconds_with_adam")
        gib = [memory and memory / 2**30 for memory in (row.get("sparse_peak_bytes"), row.get("dense_peak_bytes"))]
        cells.append(
            [
                f"CLT of {row['shape']}, F = {row['features']:,}, k = {row['k']}, {row['matmul']}",
                f"{row['tokens']:,}",
                _number(took and took * 1e3),
                _number(took and row["tokens"] / took, ",.0f"),
                _number(gib[0], ".2f"),
                _number(row.get("sparse_share_of_peak"), ".0%"),
                _number(row.get("dense_over_sparse_with_adam")),
                _number(gib[1], ".2f"),
            ]
        )
    return _table(headings, cells)


TABLES: dict[str, Callable[[list[Row]], list[str]]] = {  # by the first word of the step
    "doctor": _doctor,
    "parity": _parity,
    "bundle": _bundle,
    "engine": _engine,
    "service": _service,
    "training": _training,
    "tensorrt": _parity,
}
