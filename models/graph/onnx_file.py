"""Export a torch module to an ONNX file: external data, outputs on request, no traces of the exporting machine."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from onnx.external_data_helper import ExternalDataInfo, set_external_data
from torch import Tensor, nn

from vitrine.models.errors import VitrineError

OPSET = 20
SHARED = {"directions": "directions.npy", "last_decoders": "last_decoders.npy", "encoder_rows": "encoders.npy"}
EXTERNAL_FROM = 1024  # bytes; smaller tensors stay inside the .onnx file


class ExportError(VitrineError):
    """The exported graphs differ from the torch modules; nothing was written. The message says what differs."""


def to_onnx(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    on_request: Sequence[str] = (),
    flag: str = "",
    dynamic: Mapping[str, Mapping[int, Any]] | None = None,
) -> onnx.ModelProto:
    """Export a module; its weights become constants of the model.

    Args:
        inputs: examples, in the order in which the module takes them.
        on_request: the module's last outputs, computed only if the boolean input `flag` is true; otherwise their batch
            size is 0.
        dynamic: which axes of which inputs have any length (a `torch.export.Dim` each); default: the first input has a
            dynamic batch.
    """
    dynamic = dynamic or {next(iter(inputs)): {0: torch.export.Dim("batch")}}
    with _quiet_exporter():
        program = torch.onnx.export(
            module,
            tuple(inputs.values()),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(inputs),
            output_names=[*outputs, *on_request],
            dynamic_shapes=[dynamic.get(name) for name in inputs],
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    _strip(model)
    _turn_weights(model)
    weights = {tensor.name for tensor in model.graph.initializer}
    if same := weights & {value.name for value in (*model.graph.input, *model.graph.output)}:
        raise ExportError(
            f"{', '.join(sorted(same))}: weights of the module have the same names as its inputs or outputs"
        )
    if on_request:
        _compute_on_request(model, on_request, flag)
    return model


def save_onnx(model: onnx.ModelProto, path: Path, beside: Sequence[Path] = ()) -> None:
    """Write a model, which is modified. Large tensors go to `path`.data. The tables of `SHARED` are read from
    their files next to it, as in every variant of the model; tensors that a model or .npy file `beside` also
    has, as they are or transposed, from there."""
    for tensor in model.graph.initializer:
        if tensor.name in SHARED and (file := path.with_name(SHARED[tensor.name])).exists():
            _point_at_npy(tensor, file)
    _store_rows_once(model)
    _store_halves_losslessly(model)
    for other in beside:
        _read_from(model, other)
    onnx.save_model(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=EXTERNAL_FROM)
    if (data := path.with_name(f"{path.name}.data")).exists():  # else every large tensor is read from elsewhere
        data.chmod(0o644)  # onnx makes it private to its owner; services run as other users


def _compute_on_request(model: onnx.ModelProto, names: Sequence[str], flag: str) -> None:
    """Move the nodes that only the outputs `names` need into an `If` on the new input `flag`.

    A session computes every output of its graph even if it is not fetched; a branch that is not taken costs nothing.
    The branch reads what it shares with the other outputs from the enclosing graph.
    """
    graph = model.graph
    needed = {output.name for output in graph.output} - set(names)
    shared, optional = [], []
    for node in reversed(graph.node):  # topological order: each node before its readers
        if needed.isdisjoint(node.output):
            optional.append(node)
        else:
            shared.append(node)
            needed.update(node.input)
    optional_outputs = {output for node in optional for output in node.output}
    if missing := [name for name in names if name not in optional_outputs]:
        raise ExportError(f"{', '.join(missing)} cannot be made optional: other outputs need it")
    renamed = {name: f"{name}.asked" for name in names}
    for node in optional:
        for values in (node.input, node.output):
            values[:] = [renamed.get(value, value) for value in values]

    infos = {output.name: output.type.tensor_type for output in graph.output}
    empty = []
    for name in names:
        shape = [0, *(dimension.dim_value for dimension in infos[name].shape.dim[1:])]
        tensor = helper.make_tensor(f"{name}.nothing", infos[name].elem_type, shape, [])
        empty.append(helper.make_node("Constant", [], [f"{name}.not_asked"], value=tensor))

    def branch_outputs(suffix: str) -> list[onnx.ValueInfoProto]:
        return [helper.make_tensor_value_info(f"{name}.{suffix}", infos[name].elem_type, None) for name in names]

    choice = helper.make_node(
        "If",
        [flag],
        list(names),
        then_branch=helper.make_graph(optional[::-1], "asked", [], branch_outputs("asked")),
        else_branch=helper.make_graph(empty, "not_asked", [], branch_outputs("not_asked")),
    )
    graph.input.append(helper.make_tensor_value_info(flag, TensorProto.BOOL, []))
    del graph.node[:]
    graph.node.extend([*shared[::-1], choice])


def _strip(model: onnx.ModelProto) -> None:
    """Remove the exporter's debugging information: stack traces with paths of the exporting machine."""
    graph = model.graph
    del graph.value_info[:]
    for part in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        del part.metadata_props[:]
        part.ClearField("doc_string")


def _turn_weights(model: onnx.ModelProto) -> None:
    """Store a weight as it is multiplied with, where the exporter left its transposition in the graph: it does so with
    all but small ones that two products read, and what looks for products with a weight would find none."""
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer if len(tensor.dims) == 2}
    readers = Counter(name for node in graph.node for name in node.input)
    nodes = []
    for node in graph.node:
        if node.op_type != "Transpose" or node.input[0] not in weights or readers[node.input[0]] > 1:
            nodes.append(node)
            continue
        tensor = weights[node.input[0]]
        turned = np.ascontiguousarray(onnx.numpy_helper.to_array(tensor).T)
        tensor.CopyFrom(onnx.numpy_helper.from_array(turned, node.output[0]))
    del graph.node[:]
    graph.node.extend(nodes)


def _store_rows_once(model: onnx.ModelProto) -> None:
    """Deduplicate the rows of tables used only in lookups whose rows mostly repeat: unique rows, and an index per row.

    The token embeddings of a CLIP with a small vocabulary are 0 for all other tokens.
    """
    graph = model.graph
    tables = {tensor.name: tensor for tensor in graph.initializer if len(tensor.dims) == 2 and tensor.dims[0]}
    for node in graph.node:
        inner = [name for attribute in node.attribute for part in attribute.g.node for name in part.input]
        looked_up = node.op_type == "Gather" and not any(attribute.i for attribute in node.attribute)  # axis 0
        for name in [*inner, *node.input[looked_up:]]:
            tables.pop(name, None)
    nodes, shortened, looked_up_in = [], set(), {node.input[0] for node in graph.node if node.op_type == "Gather"}
    for name, tensor in tables.items():
        if name not in looked_up_in or tensor.data_location == TensorProto.EXTERNAL:
            continue
        rows, places = np.unique(onnx.numpy_helper.to_array(tensor), axis=0, return_inverse=True)
        if 2 * len(rows) <= len(places):
            shortened.add(name)
            graph.initializer.append(onnx.numpy_helper.from_array(places.astype(np.int32), f"{name}.places"))
            tensor.CopyFrom(onnx.numpy_helper.from_array(rows, name))
    for node in graph.node:
        if node.op_type == "Gather" and node.input[0] in shortened:  # each of those that look rows up
            place = f"{node.output[0]}.place"
            nodes.append(helper.make_node("Gather", [f"{node.input[0]}.places", node.input[1]], [place]))
            node.input[1] = place
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _store_halves_losslessly(model: onnx.ModelProto) -> None:
    """Store float32 tensors as float16, with a Cast (folded at session creation), if every value is exact in float16.

    Many published CLIP weights are float16; their bundles need half the space, with identical values.
    """
    graph = model.graph
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or tensor.data_location == TensorProto.EXTERNAL:
            continue  # a tensor in an external file stays as it is there
        values = onnx.numpy_helper.to_array(tensor)
        with np.errstate(over="ignore"):
            halves = values.astype(np.float16)
        if values.nbytes < EXTERNAL_FROM or not np.array_equal(halves.astype(np.float32), values):
            continue
        name = tensor.name
        tensor.CopyFrom(onnx.numpy_helper.from_array(halves, f"{name}.half"))
        casts.append(helper.make_node("Cast", [f"{name}.half"], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _point_at_npy(tensor: TensorProto, file: Path) -> None:
    """Make an ONNX tensor read its bytes from a .npy file with the same values."""
    mapped = np.load(file, mmap_mode="r")
    if mapped.nbytes != len(tensor.raw_data) or mapped.tobytes() != tensor.raw_data:
        raise ExportError(f"{tensor.name} and {file.name} hold different values")
    set_external_data(tensor, file.name, offset=mapped.offset, length=mapped.nbytes)
    tensor.ClearField("raw_data")


def _read_from(model: onnx.ModelProto, other: Path) -> None:
    """Make tensors read their bytes from the data of another model in the same folder, or from a .npy file there, if it
    has the same bytes, or those of the transposed matrix: a Transpose, folded at session creation, is added then."""
    entries: dict[bytes, _Place] = {}
    for entry in _places_in(other):
        with (other.parent / entry.location).open("rb") as file:
            file.seek(entry.offset or 0)
            entries[hashlib.sha256(file.read(entry.length or -1)).digest()] = entry
    turns = []
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            continue
        match = entries.get(hashlib.sha256(tensor.raw_data).digest())
        if match is None and len(tensor.dims) == 2 and len(tensor.raw_data) >= EXTERNAL_FROM:
            turned = np.ascontiguousarray(onnx.numpy_helper.to_array(tensor).T)
            if match := entries.get(hashlib.sha256(turned.tobytes()).digest()):
                name = tensor.name
                tensor.CopyFrom(onnx.numpy_helper.from_array(turned, f"{name}.transposed"))
                turns.append(helper.make_node("Transpose", [f"{name}.transposed"], [name], perm=[1, 0]))
        if match:
            set_external_data(tensor, match.location, offset=match.offset, length=match.length)
            tensor.ClearField("raw_data")
    nodes = [*turns, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


class _Place(NamedTuple):
    """Where a tensor's bytes lie."""

    location: str  # name of the file
    offset: int | None
    length: int | None


def _places_in(other: Path) -> Iterator[_Place]:
    """The tensors of a model that lie in files of their own, or the one of a .npy file."""
    if other.suffix == ".npy":
        mapped = np.load(other, mmap_mode="r")
        yield _Place(other.name, mapped.offset, mapped.nbytes)
        return
    for tensor in onnx.load(other, load_external_data=False).graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            entry = ExternalDataInfo(tensor)
            yield _Place(entry.location, entry.offset, entry.length)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence the exporter: its warnings are about its own internals, and the parity check is what counts."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
