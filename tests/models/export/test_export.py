"""Exported graphs match the torch modules, and the checks notice any that do not."""

import shutil
from copy import deepcopy
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tokenizers import Tokenizer

from common import ROOT
from vitrine.models.bundle.bundle import open_bundle
from vitrine.models.bundle.label_sets import NamedLabels
from vitrine.models.bundle.layout import ALWAYS, DETAILS_INPUT, EVERY_OUTPUT, ON_REQUEST
from vitrine.models.clip.tokens import TokenizerMismatch, convert_tokenizer
from vitrine.models.export import export
from vitrine.models.export.export import export_bundle
from vitrine.models.export.parity import check_vision
from vitrine.models.graph import onnx_file
from vitrine.models.graph.attribution import AttributionGraph
from vitrine.models.graph.onnx_file import ExportError


def run(path, pixels, details=True):
    session = onnxruntime.InferenceSession(path / "vision.onnx", providers=["CPUExecutionProvider"])
    names, feeds = EVERY_OUTPUT, {"pixels": pixels.numpy(), DETAILS_INPUT: np.array(details)}
    return dict(zip(names, session.run(names, feeds), strict=True))


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_vision_graph_takes_any_batch(bundle, graph, make_pixels, batch):
    outputs, pixels = run(bundle.path, make_pixels(batch)), make_pixels(batch)
    assert [outputs[name].shape[1:] for name in outputs] == [
        (24,), (9, 24), (), (9,), (), (3, 8), (3, 8), (3,), (2,), (9, 32),
        (3, 24), (3, 24), (3, 4, 17), (3, 17, 32), (17,), (3, 4, 32)
    ]  # fmt: skip
    for name, expected in zip(outputs, graph(pixels), strict=True):
        assert len(outputs[name]) == batch
        if not name.startswith("feature_"):
            np.testing.assert_allclose(outputs[name], expected, rtol=1e-4, atol=1e-5)


def test_details_are_left_out_where_nobody_asks(bundle, make_pixels):
    detailed, plain = (run(bundle.path, make_pixels(2), details) for details in (True, False))
    for name in ALWAYS:
        assert np.array_equal(plain[name], detailed[name]), name
    assert [plain[name].shape[0] for name in ON_REQUEST] == [0] * len(ON_REQUEST)


def test_details_are_computed_in_a_branch_of_their_own(bundle):
    """Nodes outside the branch run for every request."""
    graph = onnx.load(bundle.path / "vision.onnx", load_external_data=False).graph
    (choice,) = (node for node in graph.node if node.op_type == "If")
    assert list(choice.output) == list(ON_REQUEST)
    read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    branch = choice.attribute[0].g if choice.attribute[0].name == "then_branch" else choice.attribute[1].g
    read |= {name for node in branch.node for name in node.input}
    assert [node.name for node in graph.node if read.isdisjoint(node.output)] == []
    needed = set(ALWAYS)
    for node in reversed(graph.node):
        if node is not choice and not needed.isdisjoint(node.output):
            needed.update(node.input)
    assert [node.name for node in graph.node if node is not choice and needed.isdisjoint(node.output)] == []


def test_what_other_outputs_need_cannot_be_left_to_a_request():
    class Doubled(torch.nn.Module):
        def forward(self, x):
            half = x + 1
            return half * 2, half

    with pytest.raises(ExportError, match="half cannot be made optional: other outputs need it"):
        onnx_file.to_onnx(Doubled(), {"x": torch.rand(2, 3)}, ["y"], ["half"], "asked")


def test_a_table_of_repeating_rows_may_be_looked_up_several_times(tmp_path):
    """By layer, as the decoders' biases are: of a CLT that was not trained they are all 0."""

    class Selected(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.rand(2, 4000).repeat(3, 1))

        def forward(self, x):
            return torch.stack([x[layer] @ self.table[layer] for layer in range(6)])

    module, x = Selected(), torch.rand(6, 4000)  # small tables become constants of each lookup
    model = onnx_file.to_onnx(module, {"x": x}, ["y"], dynamic={"none": {}})
    onnx_file.save_onnx(model, tmp_path / "graph.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "graph.onnx", providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(["y"], {"x": x.numpy()})[0], module(x).numpy(), rtol=1e-5)


def test_weights_named_as_an_output_are_refused():
    """They become constants of that name, or not, by their size: ONNX Runtime refuses two things of one name."""

    class Named(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("y", torch.rand(3, 3))

        def forward(self, x):
            return x @ self.y

    with pytest.raises(onnx_file.ExportError, match="y: weights of the module"):
        onnx_file.to_onnx(Named(), {"x": torch.rand(2, 3)}, ["y"])


def test_text_graph_and_tokenizer_embed_labels_as_clip_does(bundle, clip):
    tokenizer = Tokenizer.from_file(str(bundle.path / "tokenizer.json"))
    session = onnxruntime.InferenceSession(bundle.path / "text.onnx", providers=["CPUExecutionProvider"])
    labels = ["red circle", "it's naïve!", "a much longer label than sixteen tokens " * 3]
    tokens = np.array([encoding.ids for encoding in tokenizer.encode_batch(labels)])  # clean as they are
    (embeddings,) = session.run(["text_embedding"], {"tokens": tokens})
    np.testing.assert_allclose(embeddings, clip.encode_labels(labels, ["{}"]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ("prior", "rows|sigma_without"),
        ("bias", "rows|sigma_without|fidelity"),
        ("fold", "rows|fidelity"),
        ("beta", "rows"),
        ("directions", "rows|sigma_without|fidelity"),
        ("cls_mean", "fidelity"),
        ("last_decoders", "projection"),
        ("encoder_rows", "feature"),
        ("encoder_biases", "feature"),
        ("attention.0.out.bias", "feature"),
        ("attention.2.key_value.weight", "feature"),
    ],
)
def test_check_notices_another_table(clip, graph, bundle, table, named):
    other = deepcopy(graph)
    other.state_dict()[table][::2] *= 1.1
    with pytest.raises(ExportError, match=f"^({named})"):
        check_vision(clip, other, bundle.path / "vision.onnx")


def test_check_notices_candidates_of_other_encoders(clip, graph, bundle):
    """These encoders only select the candidates, so only another order of features can be noticed."""
    other = deepcopy(graph)
    other.state_dict()["encoders.1.weight"].neg_()
    with pytest.raises(ExportError, match=r"^feature"):
        check_vision(clip, other, bundle.path / "vision.onnx")


def test_check_notices_other_thresholds_and_budgets(clip, exported_clt, any_bundle, cls_mean):
    path, tables = any_bundle.path / "vision.onnx", getattr(torch, any_bundle.manifest.tables)
    graph = AttributionGraph(clip.tower, exported_clt, cls_mean, tables).eval()
    check_vision(clip, graph, path)
    if graph.threshold is not None:
        graph.threshold *= 1.5
        with pytest.raises(ExportError, match=r"^feature \d+ of layer \d: activation differs"):
            check_vision(clip, graph, path)
    if graph.usable is not None and graph.threshold is None:
        graph.usable[:] = graph.usable.flip(0)
        with pytest.raises(ExportError, match=r"^feature \d+ of layer \d: activation differs"):
            check_vision(clip, graph, path)


@pytest.mark.parametrize("weight", ["conv1.weight", "transformer.resblocks.1.mlp.c_fc.weight", "ln_post.bias", "proj"])
def test_check_notices_another_clip(clip, graph, bundle, weight):
    model = deepcopy(clip.model)
    model.visual.get_parameter(weight)[0] += 0.1
    with pytest.raises(ExportError, match=r"^embedding against open_clip's encode_image: relative difference"):
        check_vision(replace(clip, model=model), graph, bundle.path / "vision.onnx")


def test_check_notices_rows_that_do_not_add_up(clip, graph, bundle, tmp_path):
    path = shutil.copytree(bundle.path, tmp_path / "other") / "vision.onnx"
    model = onnx.load(path, load_external_data=False)
    (prior,) = (tensor for tensor in model.graph.initializer if tensor.name == "prior")
    prior.CopyFrom(onnx.numpy_helper.from_array(1.001 * onnx.numpy_helper.to_array(prior), "prior"))
    onnx.save(model, path)
    with pytest.raises(ExportError, match=r"^sum of rows against the embedding"):
        check_vision(clip, graph, path)


def test_check_notices_what_is_no_number(clip, graph, bundle):
    other = deepcopy(graph)
    other.last_decoders[:] = torch.nan
    with pytest.raises(ExportError, match=r"^projection .* nan"):
        check_vision(clip, other, bundle.path / "vision.onnx")


@pytest.mark.parametrize(
    "overrides", [{"quick_gelu": True}, {"vision_cfg": {"no_ln_pre": True}}, {"vision_cfg": {"ls_init_value": 0.1}}]
)
def test_variants_export(make_clip, make_clt, make_pixels, provenance, tmp_path, overrides):
    clip = make_clip(**overrides)
    exported = export_bundle(clip, make_clt(clip), torch.zeros(3, 32), provenance, tmp_path / "variant")
    pixels = make_pixels(2)
    plain = clip.model.encode_image(pixels, normalize=True)
    np.testing.assert_allclose(run(exported.path, pixels)["rows"].sum(1), plain, rtol=0, atol=1e-5)


def test_every_clt_exports(any_bundle, exported_clt, clip, cls_mean, make_pixels):
    """`export_bundle` compares it with torch; this test with open_clip, and its features with the CLT's own."""
    pixels = make_pixels(4, seed=8)
    outputs = run(any_bundle.path, pixels)
    plain = clip.model.encode_image(pixels, normalize=True)
    np.testing.assert_allclose(outputs["embedding"], plain, rtol=0, atol=1e-5)
    np.testing.assert_allclose(outputs["rows"].sum(1), plain, rtol=0, atol=1e-5)
    if any_bundle.manifest.tables == "float16":
        return  # rounded encoders may activate other features: see test_graph
    codes = exported_clt.encode(clip.tower(pixels).mlp_in[:, :, 0], torch.ones(4, dtype=torch.bool))
    for layer, code in enumerate(codes):
        ours, theirs = np.zeros((4, 64), np.float32), np.zeros((4, 64), np.float32)
        np.add.at(
            ours, (np.arange(4)[:, None], outputs["feature_indices"][:, layer]), outputs["feature_values"][:, layer]
        )
        np.add.at(theirs, (np.arange(4)[:, None], code.indices), code.values)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("remembered_conversions")
def test_float16_tables_halve_the_table_and_keep_rows_exact(
    bundle, clip, clt, cls_mean, make_pixels, provenance, tmp_path
):
    halved = export_bundle(clip, clt, cls_mean, provenance, tmp_path / "halved", tables="float16")
    assert (halved.manifest.tables, halved.directions.dtype) == ("float16", np.float16)
    np.testing.assert_array_equal(halved.directions, bundle.directions.astype(np.float16))
    pixels = make_pixels(4)
    outputs, full = run(halved.path, pixels), run(bundle.path, pixels)
    np.testing.assert_allclose(outputs["rows"].sum(1), outputs["embedding"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(outputs["embedding"], full["embedding"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(outputs["rows"], full["rows"], rtol=0, atol=1e-2)


def test_vision_graph_reads_directions_npy(bundle, make_pixels, tmp_path):
    model = onnx.load(bundle.path / "vision.onnx", load_external_data=False)
    (table,) = (tensor for tensor in model.graph.initializer if tensor.name == "directions")
    assert {entry.key: entry.value for entry in table.external_data}["location"] == "directions.npy"

    copied = shutil.copytree(bundle.path, tmp_path / "copied")
    np.save(copied / "directions.npy", 2 * bundle.directions)
    pixels = make_pixels(1)
    before, after = run(bundle.path, pixels)["rows"], run(copied, pixels)["rows"]
    np.testing.assert_allclose(after[:, 4:7], 2 * before[:, 4:7], rtol=1e-4, atol=1e-6)  # the clt rows
    np.testing.assert_allclose(after[:, :4], before[:, :4], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["vision.onnx", "text.onnx"])
def test_graphs_reveal_nothing_about_the_machine_that_made_them(bundle, name):
    content = (bundle.path / name).read_bytes()
    for trace in (str(ROOT), "site-packages", ".py", "Traceback", 'File "'):
        assert trace.encode() not in content


def test_files_are_readable_by_others(bundle):
    assert all(file.stat().st_mode & 0o044 == 0o044 for file in bundle.path.iterdir())


class _Product(torch.nn.Module):
    def __init__(self, **tables):
        super().__init__()
        for name, table in tables.items():
            self.register_buffer(name, table)

    def forward(self, x):
        return sum(x @ table for table in self.buffers())


def test_weights_that_are_halves_are_stored_as_halves(tmp_path):
    halves, floats = torch.arange(1024.0).view(32, 32) / 8, torch.rand(32, 32)
    module, path = _Product(halves=halves, floats=floats), tmp_path / "product.onnx"
    x = torch.rand(2, 32)
    onnx_file.save_onnx(onnx_file.to_onnx(module, {"x": x}, ["y"]), path)
    assert path.with_name("product.onnx.data").stat().st_size < 32 * 32 * 7  # of 2 + 4 bytes, and alignment
    (result,) = onnxruntime.InferenceSession(path).run(["y"], {"x": x.numpy()})
    np.testing.assert_allclose(result, module(x), rtol=1e-5)


class _LookUp(torch.nn.Module):
    def __init__(self, table, product=False):
        super().__init__()
        self.product = product
        self.register_buffer("table", table)

    def forward(self, tokens):
        rows = torch.nn.functional.embedding(tokens, self.table)
        return self.table @ rows.flatten(0, 1).T if self.product else rows


@pytest.mark.parametrize(("rows", "product", "stored"), [(500, False, 500), (600, False, 1000), (500, True, 1000)])
def test_rows_that_repeat_are_stored_once(tmp_path, rows, product, stored):
    table = torch.rand(rows, 8).repeat(2, 1)[:1000]
    module, path, tokens = _LookUp(table, product), tmp_path / "table.onnx", torch.tensor([[0, 999, 500], [1, 1, 499]])
    onnx_file.save_onnx(onnx_file.to_onnx(module, {"tokens": tokens}, ["y"]), path)
    model = onnx.load(path)
    assert [list(tensor.dims) for tensor in model.graph.initializer if len(tensor.dims) == 2] == [[stored, 8]]
    (result,) = onnxruntime.InferenceSession(path).run(["y"], {"tokens": tokens.numpy()})
    np.testing.assert_allclose(result, module(tokens), rtol=1e-6)


def test_directions_that_are_halves_are_stored_once(tmp_path):
    directions = torch.arange(1024.0).view(32, 32) / 8
    np.save(tmp_path / "directions.npy", directions)
    module, path = _Product(directions=directions, floats=torch.rand(32, 32)), tmp_path / "product.onnx"
    onnx_file.save_onnx(onnx_file.to_onnx(module, {"x": torch.rand(2, 32)}, ["y"]), path)
    model = onnx.load(path, load_external_data=False)
    locations = {entry.value for tensor in model.graph.initializer for entry in tensor.external_data[:1]}
    assert locations == {"directions.npy", "product.onnx.data"}


def test_existing_destination_is_refused(clip, clt, cls_mean, provenance, bundle):
    with pytest.raises(ExportError, match="already exists, and a bundle is never changed"):
        export_bundle(clip, clt, cls_mean, provenance, bundle.path)
    assert open_bundle(bundle.path) == bundle


def test_clt_of_another_tower_is_refused(make_clip, clt):
    other = make_clip(vision_cfg={"layers": 2})
    with pytest.raises(ValueError, match="the CLT has 3 layers of width 32, but the tower has 2 of 32"):
        AttributionGraph(other.tower, clt, torch.zeros(3, 32), torch.float32)


def test_failed_check_leaves_nothing_behind(clip, make_clt, cls_mean, provenance, bundle, tmp_path, monkeypatch):
    def write_another_graph(_model, path):
        for name in (path.name, f"{path.name}.data"):
            shutil.copy(bundle.path / name, path.with_name(name))

    monkeypatch.setattr(export, "save_onnx", write_another_graph)
    with pytest.raises(ExportError, match=r"at batch 1|feature"):
        export_bundle(clip, make_clt(clip, seed=1), cls_mean, provenance, tmp_path / "out" / "failed")
    assert list((tmp_path / "out").iterdir()) == []


def test_labels_that_the_clip_cannot_tell_apart_are_reported(clip, provenance):
    reader = convert_tokenizer(clip.tokenizer).reader()
    sets = {"pets": NamedLabels(labels=("Dog", "dog")), "trees": NamedLabels(labels=("oak", "elm"))}
    says = "are the same text to this CLIP, so their order means nothing. Keep one of them."
    assert list(export._label_warnings(reader, provenance, sets)) == [f'label set pets: "Dog" and "dog" {says}']
    twins = replace(provenance, labels=["Cat", "cat"])
    assert list(export._label_warnings(reader, twins, {})) == [f'"Cat" and "cat" {says}']


def test_tokenizer_that_reads_a_label_otherwise_is_refused(clip, clt, cls_mean, provenance, tmp_path, monkeypatch):
    wrong = replace(convert_tokenizer(clip.tokenizer), clean="whitespace")
    monkeypatch.setattr(export, "convert_tokenizer", lambda tokenizer: wrong)
    with pytest.raises(TokenizerMismatch, match="tokens of 'a photo of a Cat'"):
        export_bundle(clip, clt, cls_mean, replace(provenance, labels=["Cat"]), tmp_path / "failed")
    assert list(tmp_path.iterdir()) == []
