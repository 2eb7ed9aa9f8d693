"""Every image of a folder through /v1/attribute of a running service: statuses, how exactly the ledgers add up, top-1.

python loadtests/folder.py photos/
python loadtests/folder.py cifar10/val --classes          # folders are the true labels
"""

from __future__ import annotations

import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.progress import track

from vitrine.models.inputs.imagenet import class_label

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}


def main(
    folder: Path,
    url: str = "http://127.0.0.1:3000",
    classes: Annotated[
        bool, typer.Option(help="The name of an image's folder is its label, or its WordNet id.")
    ] = False,
    clients: int = 4,
) -> None:
    """Exit code 1 unless every answer is 200 with |remainder| <= 1e-3 and rows that sum to the logit."""
    images = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not images:
        raise typer.BadParameter(f"no images under {folder}")
    with httpx.Client(base_url=url, timeout=60) as client, ThreadPoolExecutor(clients) as pool:
        posted = pool.map(lambda path: client.post("/v1/attribute", files={"image": path.read_bytes()}), images)
        answers = list(track(posted, "attribute", total=len(images)))

    statuses = Counter(answer.status_code for answer in answers)
    good = [(path, answer.json()) for path, answer in zip(images, answers, strict=True) if answer.status_code == 200]
    print(f"{len(images)} images: " + ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items())))
    remainder = max(abs(e["ledger"]["remainder"]) for _, answer in good for e in answer["explanations"])
    difference = max(abs(_sum_of_rows(e["ledger"]) - e["logit"]) for _, answer in good for e in answer["explanations"])
    r2 = sorted(answer["fidelity"]["r2"] for _, answer in good if answer["fidelity"])  # none without a CLT
    fidelity = f", median R2 {r2[len(r2) // 2]:.3f}" if r2 else ""
    print(f"largest |remainder| {remainder:.1e}, largest |sum of rows - logit| {difference:.1e}{fidelity}")
    if classes:
        correct = sum(answer["predictions"][0]["label"] == class_label(path.parent.name) for path, answer in good)
        print(f"zero-shot top-1 {correct / len(good):.4f}")
    if statuses != {200: len(images)} or remainder > 1e-3 or difference > 1e-3:
        raise typer.Exit(1)


def _sum_of_rows(ledger: dict[str, Any]) -> float:
    written = ledger["clt"] or ledger["mlp"]  # without a CLT
    rows = (ledger["prior"], *ledger["attention"], *written, ledger["bias"], ledger["error"])
    return math.fsum(rows)


if __name__ == "__main__":
    typer.run(main)
