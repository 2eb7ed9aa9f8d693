"""Bundles that many tests read, exported once a run; and conversions of one and the same module, done once a run.

An export is conversion by torch, nearly all of it: ten to forty seconds for the tiny CLIP. The workers of a run share
what they have made through its temporary folder.
"""

import hashlib
import os
import pickle
import time
from contextlib import contextmanager
from types import SimpleNamespace

import filelock
import onnx
import pytest
import torch

from vitrine.models.bundle.bundle import open_bundle
from vitrine.models.files.writing import written


def shared_folder(tmp_path_factory):
    """A folder of this run that all of its workers share."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


class Bundles:
    """Each is exported by the first worker that needs it; one that comes second exports another one meanwhile.

    makers: by name, what writes the bundle into the folder that it is given.
    """

    def __init__(self, conversions, makers):
        self.conversions, self.folder, self.makers = conversions, conversions.folder, makers

    def __getitem__(self, name):
        """The bundle, opened; copy it before changing anything in it."""
        while not (self.folder / name).exists() and not self._make(name):
            if not any(map(self._make, self.makers)):
                time.sleep(0.1)
        return open_bundle(self.folder / name)

    def _make(self, name):
        """Export it, unless it is there or another worker is at it; whether it was exported now."""
        try:
            with filelock.FileLock(self.folder / f"{name}.lock", timeout=0):
                if (self.folder / name).exists():
                    return False
                with self.conversions.remembered():
                    self.makers[name](self.folder / name)
                return True
        except filelock.Timeout:
            return False


class Conversions:
    """`torch.onnx.export`, which answers from `folder` where it has converted an equal module in the same way before.

    Equal are classes, weights and every other attribute, not the classes' code: where a test changes that, nothing may
    be remembered.
    """

    def __init__(self, folder):
        self.folder, self.convert = folder, torch.onnx.export

    @contextmanager
    def remembered(self):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.onnx, "export", self._export)
            yield

    def _export(self, *args, **options):
        try:
            file = self.folder / f"{_fingerprint((args, options))}.onnx"
        except (pickle.PicklingError, AttributeError, TypeError, ValueError):  # it has parts that have no name
            return self.convert(*args, **options)
        if not file.exists():
            with written(file, shared=True) as partial:
                partial.write_bytes(self.convert(*args, **options).model_proto.SerializeToString())
        return SimpleNamespace(model_proto=onnx.load(file))


def _fingerprint(value):
    """A hash of all that pickle would store, with the contents of tensors."""
    digest = hashlib.sha256()
    pickler = _Pickler(SimpleNamespace(write=digest.update))
    pickler.fast = True  # whether equal parts are one object does not count: a conversion leaves copies of some behind
    pickler.dump(value)
    return digest.hexdigest()


class _Pickler(pickle.Pickler):
    def reducer_override(self, value):
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        content = hashlib.sha256(value.detach().contiguous().numpy().tobytes()).hexdigest()
        return type(value), (str(value.dtype), tuple(value.shape), value.stride(), value.requires_grad, content)
