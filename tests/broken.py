"""Bundles that are whole, by their sums, and wrong: for every way in which a bundle is loaded.

`BROKEN` has for each a change of a copy of the tiny bundle, and what its refusal must name.
"""

import hashlib
import json
import os
import shutil

import numpy as np
import onnx
from onnx import TensorProto, helper


def copy(source, target):
    """A copy without the bytes: hard links, so that a file must be replaced and not written to."""
    return shutil.copytree(source, target, copy_function=os.link)


def replace_file(file, content):
    file.unlink(missing_ok=True)
    file.write_bytes(content)


def write_manifest(folder, change=lambda manifest: None, unlisted=()):
    """Write the manifest of what is there, passed through `change`; nothing is checked."""
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    manifest["files"] = {
        name: {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        for name, content in files.items()
        if name != "manifest.json" and name not in unlisted
    }
    change(manifest)
    replace_file(folder / "manifest.json", json.dumps(manifest).encode())


def field(path, value):
    """One field of the manifest is another."""

    def change(folder):
        def update(manifest):
            *parents, last = path.split(".")
            for name in parents:
                manifest = manifest[name]
            manifest[last] = value

        write_manifest(folder, update)

    return change


def table(name, value):
    """One number of a table is `value`."""

    def change(folder):
        values = np.load(folder / name)
        values.reshape(-1)[-1] = value
        (folder / name).unlink()
        np.save(folder / name, values)
        write_manifest(folder)

    return change


def short_fold(folder):
    """A fold.npy with a row too few, which the manifest lists as it is: found out by loading it."""
    values = np.load(folder / "fold.npy")[:-1]
    (folder / "fold.npy").unlink()
    np.save(folder / "fold.npy", values)
    write_manifest(folder)


def content(name, new):
    """A file is another: `new`, or made of the old bytes by it."""

    def change(folder):
        old = (folder / name).read_bytes() if (folder / name).exists() else b""
        (folder / name).parent.mkdir(exist_ok=True)
        replace_file(folder / name, new(old) if callable(new) else new)
        write_manifest(folder)

    return change


def tokenizer(update):
    def new(old):
        settings = json.loads(old)
        update(settings)
        return json.dumps(settings).encode()

    return content("tokenizer.json", new)


def unlisted(*names, gone=False):
    def change(folder):
        if gone:
            for name in names:
                (folder / name).unlink()
        write_manifest(folder, unlisted=names)

    return change


def another_text(width, context=16, value=1.0):
    """A text graph with another width or context, or that gives `value`."""
    weights = helper.make_tensor("weights", TensorProto.FLOAT, (context, width), [value] * (context * width))
    nodes = [
        helper.make_node("Cast", ["tokens"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["numbers", "weights"], ["text_embedding"]),
    ]
    inputs = [helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", context])]
    outputs = [helper.make_tensor_value_info("text_embedding", TensorProto.FLOAT, ["batch", width])]
    graph = helper.make_graph(nodes, "text", inputs, outputs, [weights])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return content("text.onnx", lambda _: model.SerializeToString())


def renamed_output(old):
    model = onnx.load_from_string(old)
    model.graph.node.append(helper.make_node("Identity", ["sigma"], ["another"]))
    next(output for output in model.graph.output if output.name == "sigma").name = "another"
    return model.SerializeToString()


def label_set(labels, embeddings):
    def change(folder):
        (folder / "label_sets").mkdir()
        (folder / "label_sets/pets.json").write_bytes(labels)
        if embeddings is not None:
            np.save(folder / "label_sets/pets.npy", np.array(embeddings, np.float32))
        write_manifest(folder)

    return change


def all_bits(old):
    return b"\xff" * len(old)  # float32: NaN


NAN, PETS = float("nan"), b'{"labels": ["cat", "dog"]}'
UNIT = np.eye(2, 24)
BROKEN = {
    # what the manifest says, by itself
    "scale 0": (field("logit_scale", 0), ["logit_scale"]),
    "scale negative": (field("logit_scale", -1), ["logit_scale"]),
    "scale NaN": (field("logit_scale", NAN), ["logit_scale"]),
    "scale that overflows": (field("logit_scale", 1e308), ["logit_scale"]),
    "std 0": (field("preprocessing.std", [0.2, 0, 0.2]), ["preprocessing.std.1"]),
    "std NaN": (field("preprocessing.std", [NAN, 0.2, 0.2]), ["preprocessing.std.0"]),
    "mean infinite": (field("preprocessing.mean", [0.5, 0.5, float("inf")]), ["preprocessing.mean.2"]),
    "no labels": (field("text.labels", []), ["text.labels"]),
    "blank label": (field("text.labels", ["cat", " "]), ["text.labels.1"]),
    "a label twice": (field("text.labels", ["cat", "dog", "cat"]), ["text.labels", "'cat' is given twice"]),
    "no templates": (field("text.templates", []), ["text.templates"]),
    "template without {}": (field("text.templates", ["a photo"]), ["text.templates.0"]),
    "layers without end": (field("shape.layers", 10**12), ["shape.layers"]),
    "features without end": (field("shape.features", 10**18), ["shape.features"]),
    "image without end": (field("preprocessing.size", [10**9, 10**9]), ["preprocessing.size.0"]),
    "no patches": (field("shape.tokens", 1), ["shape.tokens"]),
    "patches that fill no image": (field("shape.tokens", 18), ["shape.tokens"]),
    "metric NaN": (field("metrics.r2", NAN), ["metrics.r2"]),
    "file name too long": (field("files", {"x" * 5000: {"sha256": "0" * 64, "bytes": 0}}), ["does not list vision"]),
    # what it says of the other files
    "another image size": (field("preprocessing.size", [48, 48]), ["vision.onnx", "pixels", "preprocessing.size"]),
    "another k": (field("shape.k", 9), ["vision.onnx", "feature_indices", "shape"]),
    "another number of patches": (field("shape.tokens", 10), ["vision.onnx", "attention_weights", "shape"]),
    "another embedding": (field("shape.embedding", 25), ["fold.npy"]),
    "more features": (field("shape.features", 65), ["directions.npy"]),
    "another context": (field("text.context", 17), ["text.onnx", "tokens", "text.context"]),
    "another padding": (field("text.pad", 7), ["tokenizer.json", "text.pad"]),
    "attention.npy unlisted": (unlisted("attention.npy"), ["does not list attention.npy"]),
    "attention.npy gone": (unlisted("attention.npy", gone=True), ["vision.onnx", "details", "attention.npy"]),
    "decoders unlisted": (unlisted("last_decoders.npy"), ["does not list last_decoders.npy"]),
    # tables and graphs
    "directions NaN": (table("directions.npy", NAN), ["directions.npy", "not finite"]),
    "fold infinite": (table("fold.npy", float("inf")), ["fold.npy", "not finite"]),
    "attention NaN": (table("attention.npy", NAN), ["attention.npy", "not finite"]),
    "vision NaN": (content("vision.onnx.data", all_bits), ["vision.onnx", "not finite"]),
    "text NaN": (content("text.onnx.data", all_bits), ["text.onnx", "not finite"]),
    "vision no graph": (content("vision.onnx", b"nothing"), ["vision.onnx cannot be used"]),
    "weights cut off": (content("vision.onnx.data", lambda old: old[:-4096]), ["vision.onnx cannot be used"]),
    "an output missing": (content("vision.onnx", renamed_output), ["vision.onnx", "no output sigma"]),
    "text of another width": (another_text(12), ["text.onnx", "text_embedding"]),
    "text of another context": (another_text(24, context=8), ["text.onnx", "tokens", "text.context"]),
    "text of length 0": (another_text(24, value=0.0), ["text.onnx", "does not have length 1"]),
    # tokenizer
    "no tokenizer": (content("tokenizer.json", b"{}"), ["tokenizer.json cannot be used"]),
    "tokenizer without padding": (tokenizer(lambda t: t.update(padding=None)), ["tokenizer.json", "padding"]),
    "tokenizer without end": (tokenizer(lambda t: t.update(truncation=None)), ["tokenizer.json", "truncation"]),
    "tokenizer of more words": (
        tokenizer(lambda t: t["model"]["vocab"].update({"zzzz": 60_000})),
        ["text.onnx", "60000", "tokenizer.json"],
    ),
    "tokens written that are none": (
        field("text.written", ["<mask>"]),
        ["tokenizer.json", "text.written", "'<mask>'"],
    ),
    "another cleaning": (field("text.clean", "upper"), ["manifest.json", "text.clean"]),
    # label sets
    "label set NaN": (label_set(PETS, UNIT * NAN), ["pets.npy", "not finite"]),
    "label set of length 2": (label_set(PETS, UNIT * 2), ["'cat'", "does not have length 1"]),
    "label set of one row": (label_set(PETS, UNIT[:1]), ["pets.npy", "(2, 24)"]),
    "label set without table": (label_set(PETS, None), ["does not list label_sets/pets.npy"]),
    "label set no UTF-8": (label_set(b'{"labels": ["\xff"]}', UNIT), ["pets.json"]),
    "label set twice the same": (label_set(b'{"labels": ["cat", "cat"]}', UNIT), ["pets.json", "'cat'"]),
}
