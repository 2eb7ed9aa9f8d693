"""Sends every image of a folder to /v1/attribute of a running service: statuses, how exactly ledgers add up, top-1.

python loadtests/folder.py photos/
python loadtests/folder.py cifar10/val --classes          # folders are the true labels
python loadtests/folder.py photos/ --beside ViT-B-32/openai   # embeddings compared with open_clip's
"""

from __future__ import annotations

import base64
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
        bool, typer.Option(help="Use the name of an image's folder as its label, or as its WordNet id.")
    ] = False,
    beside: Annotated[
        str | None,
        typer.Option(help="NAME/TAG of a CLIP in open_clip, with its own transform and tokenizer, to compare with."),
    ] = None,
    clients: int = 4,
) -> None:
    """Send a folder of images to a service. Exit code 1 unless every answer is 200 with |remainder| <= 1e-3 and rows
    that sum to the logit, and embeddings, if compared, differ by at most 1e-5."""
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
    apart = _beside(beside, url, images) if beside else 0.0
    if statuses != {200: len(images)} or remainder > 1e-3 or difference > 1e-3 or apart > 1e-5:
        raise typer.Exit(1)


def _beside(clip: str, url: str, images: list[Path]) -> float:
    """The largest difference of an embedding's number, of all images and of ImageNet's names, to open_clip's."""
    import numpy as np
    import open_clip
    import torch
    from PIL import Image

    name, _, tag = clip.partition("/")
    quick_gelu = bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu"))
    model, _, transform = open_clip.create_model_and_transforms(name, tag, force_quick_gelu=quick_gelu)
    model, tokenize = model.eval(), open_clip.get_tokenizer(name)
    texts = [f"a photo of a {label}." for label in open_clip.IMAGENET_CLASSNAMES]
    worst = {"images": 0.0, "texts": 0.0}
    with httpx.Client(base_url=url, timeout=60) as client, torch.no_grad():
        model_id = client.get("/v1/models").raise_for_status().json()["data"][0]["id"]

        def compare(kind: str, answer: httpx.Response, own: torch.Tensor) -> None:
            served = np.asarray([row["embedding"] for row in answer.raise_for_status().json()["data"]])
            worst[kind] = max(worst[kind], float(np.abs(served - own.numpy()).max()))

        for path in track(images, "images"):
            image = "data:image/jpeg;base64," + base64.b64encode(path.read_bytes()).decode()
            own = model.encode_image(transform(Image.open(path))[None], normalize=True)
            compare("images", client.post("/v1/embeddings", json={"model": model_id, "input": image}), own)
        for at in track(range(0, len(texts), 20), "texts"):
            few = texts[at : at + 20]
            own = model.encode_text(tokenize(few), normalize=True)
            compare("texts", client.post("/v1/embeddings", json={"model": model_id, "input": few}), own)
    print(
        f"largest difference from open_clip: {len(images)} images {worst['images']:.1e}, {len(texts)} texts "
        f"{worst['texts']:.1e}"
    )
    return max(worst.values())


def _sum_of_rows(ledger: dict[str, Any]) -> float:
    written = ledger["clt"] or ledger["mlp"]  # without a CLT
    rows = (ledger["prior"], *ledger["attention"], *written, ledger["bias"], ledger["error"])
    return math.fsum(rows)


if __name__ == "__main__":
    typer.run(main)
