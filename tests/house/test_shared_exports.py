"""What the tests' exports share: nothing is made twice, nothing that differs is taken for the same."""

from types import SimpleNamespace

import filelock
import onnx
import pytest
import torch

import exports
from exports import Bundles, Conversions


@pytest.fixture
def converted(tmp_path, monkeypatch):
    """The modules that were converted, while conversions are remembered."""
    modules = []

    def export(module, *_, **options):
        modules.append(module)
        return SimpleNamespace(model_proto=onnx.ModelProto(producer_version=str(len(modules))))

    monkeypatch.setattr(torch.onnx, "export", export)
    with Conversions(tmp_path).remembered():
        yield modules


def version(module, **options):
    return torch.onnx.export(module, (torch.zeros(2, 3),), **options).model_proto.producer_version


def linear(bias=0.0):
    module = torch.nn.Linear(3, 2)
    with torch.no_grad():
        module.weight.fill_(1), module.bias.fill_(bias)
    return module


def test_an_equal_module_is_converted_once(converted):
    module, options = linear(), {"dynamic_shapes": [{0: torch.export.Dim("batch")}]}
    assert version(module, **options) == version(linear(), **options) == "1"
    assert converted == [module]


def test_equal_parts_may_be_one_object_or_two(converted):
    one, other, values = linear(), linear(), [0.5, 0.25]
    one.mean, one.std = [tuple(values)] * 2
    other.mean, other.std = tuple(values), tuple(values)
    assert version(one) == version(other) == "1"


def test_what_differs_is_converted(converted):
    training, other_step = linear().eval(), linear()
    other_step.step = 2
    modules = [linear(), linear(1e-7), training, other_step, torch.nn.Sequential(linear())]
    assert [version(module) for module in modules] == ["1", "2", "3", "4", "5"]
    assert version(linear(), dynamic_shapes=[{0: torch.export.Dim("batch")}]) == "6"


def test_a_module_without_a_name_is_not_remembered(converted):
    class Local(torch.nn.Linear):
        pass

    assert [version(Local(3, 2)) for _ in range(2)] == ["1", "2"]


def test_who_waits_for_a_bundle_makes_another_one(tmp_path, monkeypatch):
    monkeypatch.setattr(exports, "open_bundle", lambda path: path.name)
    busy, made = filelock.FileLock(tmp_path / "a.lock"), []

    def make(out):
        made.append(out.name)
        out.mkdir()
        if busy.is_locked:  # now the other worker is ready
            (tmp_path / "a").mkdir()
            busy.release()

    busy.acquire()
    bundles = Bundles(Conversions(tmp_path), dict.fromkeys("abc", make))
    assert [bundles[name] for name in "aabc"] == list("aabc")
    assert made == ["b", "c"]
