"""Weights in files, whoever saved them: read, or refused in one sentence that says what the file is."""

import argparse
import gzip
import io
import json
import pickle
import re
import tarfile
import warnings
import zipfile

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU
from safetensors.torch import load_file, save, save_file

from common import TINY_CLIP
from vitrine.models.clip import fitting
from vitrine.models.clip.errors import ClipError
from vitrine.models.clip.loading import load_clip, model_sha256

pytestmark = pytest.mark.usefixtures("one_tokenizer")
SMALL = {"text_cfg": {"vocab_size": 64}}  # as conftest's: what it would encode is not asked here
CONFIG = TINY_CLIP | {"text_cfg": TINY_CLIP["text_cfg"] | SMALL["text_cfg"]}


@pytest.fixture(scope="module")
def state(write_clip):
    """The tiny CLIP's state dict."""
    return load_file(write_clip(**SMALL)[1])


@pytest.fixture(scope="module")
def plain(make_clip):
    """The same as a CLIP, with GELU."""
    return make_clip(**SMALL)


@pytest.fixture(scope="module")
def archive(state, tmp_path_factory):
    """archive(quick_gelu, openai) -> a TorchScript archive of it in float16, with OpenAI's keys or as open_clip's."""
    folder = tmp_path_factory.mktemp("archives")

    def write(quick_gelu=True, openai=True):
        file = folder / f"{quick_gelu}-{openai}.pt"
        if not file.exists():
            model = open_clip.CLIP(**CONFIG, quick_gelu=quick_gelu).eval()
            model.load_state_dict(state)
            for name, value in {"input_resolution": 32, "context_length": 16, "vocab_size": 49408}.items():
                model.__dict__.pop(name, None)
                if openai:
                    model.register_buffer(name, torch.tensor(value))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of constants and of torch.jit itself
                inputs = torch.zeros(1, 3, 32, 32), torch.zeros(1, 16, dtype=torch.long)
                torch.jit.trace(model, inputs, check_trace=False).half().save(file)
        return file

    return write


@pytest.fixture(scope="module")
def half(state):
    """(the sha256 with GELU, with QuickGELU) of the CLIP with the weights that float16 leaves."""
    digests = []
    for quick_gelu in (False, True):
        model = open_clip.CLIP(**CONFIG, quick_gelu=quick_gelu)
        model.load_state_dict({key: value.half() for key, value in state.items()})
        digests.append(model_sha256(model))
    return digests


@pytest.fixture
def saved(tmp_path):
    """saved(content, **options) -> a file of torch.save's."""

    def save_content(content, **options):
        torch.save(content, tmp_path / "weights.pt", **options)
        return tmp_path / "weights.pt"

    return save_content


def refused(file, name="single", quick_gelu=None):
    """What is said of a file, after its name."""
    with pytest.raises(ClipError) as refusal:
        load_clip(name, str(file), quick_gelu=quick_gelu)
    message = str(refusal.value)
    assert str(file) in message
    assert "\n" not in message
    assert len(message) < 600
    return message.removeprefix(f"{file} ")


# Whoever saved them


def wrapped(prefix, state):
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"epoch": 3, "name": "run", "state_dict": wrapped("module.", state), "optimizer": {"state": {}}},
        lambda state: {"state_dict": wrapped("model.", state), "hyper_parameters": {"lr": 1e-5}},  # Lightning's
        lambda state: {"model": wrapped("module._orig_mod.", state)},
        lambda state: {key.replace("visual.", "visual._orig_mod."): value for key, value in state.items()},
        lambda state: state | {"attn_mask": torch.zeros(16, 16), "logit_scale": state["logit_scale"][None]},
    ],
)
@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_checkpoints_of_training_are_read(saved, state, plain, wrap, options):
    loaded = load_clip("single", str(saved(wrap(state), **options)))
    assert (loaded.sha256, loaded.name, loaded.weights) == (plain.sha256, "single", "weights.pt")


def test_a_file_is_told_by_its_content(state, plain, tmp_path):
    save_file(state, tmp_path / "epoch_1.pt")
    assert load_clip("single", str(tmp_path / "epoch_1.pt")).sha256 == plain.sha256
    odd = tmp_path / "odd.bin"  # its header's length begins like gzip's mark, and like JSON
    for length in (0x8B1F, 0x7B + 256 * 100):
        content = save(state)
        header = content[8 : 8 + int.from_bytes(content[:8], "little")]
        odd.write_bytes(length.to_bytes(8, "little") + header.ljust(length) + content[8 + len(header) :])
        assert load_clip("single", str(odd)).sha256 == plain.sha256


def test_a_text_tower_of_its_own_takes_the_old_names(write_clip, state, tmp_path):
    (tmp_path / "mine.json").write_text(json.dumps(CONFIG | {"custom_text": True}))
    loaded = load_clip(None, str(write_clip(**SMALL)[1]), tmp_path / "mine.json")
    torch.testing.assert_close(loaded.model.text.token_embedding.weight.data, state["token_embedding.weight"])


# The activation


@pytest.mark.parametrize("openai", [True, False])
@pytest.mark.parametrize("quick_gelu", [True, False])
def test_an_archive_says_its_activation(archive, half, openai, quick_gelu):
    if openai and not quick_gelu:
        return  # OpenAI has none such
    loaded = load_clip("small", str(archive(quick_gelu, openai)))
    assert loaded.sha256 == half[quick_gelu]
    assert isinstance(loaded.tower.blocks[0].mlp.gelu, QuickGELU) == quick_gelu
    assert loaded.name == ("small-quickgelu" if quick_gelu else "small")


def test_a_state_dict_of_openais_archive_says_it_too(archive, half, saved):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = torch.jit.load(archive(), map_location="cpu").state_dict()
    for name in ("small", "small-quickgelu", "single"):
        loaded = load_clip(name, str(saved(dict(state))))
        assert loaded.sha256 == half[True]
        assert loaded.name == ("single" if name == "single" else "small-quickgelu")


def test_weights_that_do_not_say_it_are_refused_where_there_are_two(write_clip, plain, make_clip):
    _, file = write_clip(**SMALL)
    assert refused(file, "small").startswith(f"nothing in {file} says whether it was trained with GELU or")
    assert refused(file, "small").endswith(
        "give the name small-quickgelu, for GELU set quick_gelu = false (--no-quick-gelu)"
    )
    quick = make_clip(**SMALL, quick_gelu=True).sha256
    assert load_clip("small", str(file), quick_gelu=False).sha256 == plain.sha256
    assert load_clip("small", str(file), quick_gelu=True).sha256 == quick
    assert load_clip("small-quickgelu", str(file)).sha256 == quick
    assert load_clip("single", str(file), quick_gelu=True).sha256 == quick
    assert load_clip("single", str(file)).sha256 == plain.sha256


def test_published_files_are_known_by_their_sha256(monkeypatch, write_clip, make_clip):
    _, file = write_clip(**SMALL)
    digest = fitting.file_sha256(file)
    for url, quick_gelu in (
        (f"https://host/models/{digest}/ViT.pt", True),
        (f"https://host/vit-quickgelu-{digest[:8]}.pt", True),
        (f"https://host/vit-{digest[:8]}.pth", None),
    ):
        tag = open_clip.pretrained._pcfg(url=url, quick_gelu=quick_gelu)
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "small", {"tag": tag})
        assert load_clip("small", str(file)).sha256 == make_clip(**SMALL, quick_gelu=bool(quick_gelu)).sha256
    assert "has GELU, small-quickgelu has QuickGELU: remove or correct" in refused(file, "small-quickgelu")


def test_what_openai_published_is_known():
    """The addresses that open_clip has still say their files' sha256."""
    for name in ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-L-14-336"):
        published = open_clip.get_pretrained_cfg(name, "openai")
        assert len(fitting._PUBLISHED.search(published["url"])[1]) == 64
        assert published["quick_gelu"]


def test_facts_that_contradict_one_another_are_refused(archive, write_clip):
    file = archive()
    assert refused(file, "small", False) == "has QuickGELU, `quick_gelu` says GELU: remove or correct what is wrong"
    assert "has GELU, small-quickgelu has QuickGELU" in refused(archive(False, False), "small-quickgelu")
    assert "small-quickgelu has QuickGELU, `quick_gelu` says GELU" in _refused_of(write_clip(**SMALL)[1])


def _refused_of(file):
    with pytest.raises(ClipError) as refusal:
        load_clip("small-quickgelu", str(file), quick_gelu=False)
    return str(refusal.value)


def test_a_configuration_of_ones_own_says_it(write_clip, archive, half, make_clip, plain):
    config, file = write_clip(**SMALL)
    assert load_clip(None, str(file), config, quick_gelu=True).sha256 == make_clip(**SMALL, quick_gelu=True).sha256
    assert load_clip(None, str(archive()), config).sha256 == half[True]
    gelu, _ = write_clip(**SMALL, quick_gelu=False)
    with pytest.raises(ClipError, match=r"has QuickGELU, tiny-\d+ has GELU"):
        load_clip(None, str(archive()), gelu)


# Files that have no weights of a CLIP


def zipped(name):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as opened:
        opened.writestr(name, b"x" * 1000)
    return buffer.getvalue()


def tarred():
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as opened:
        opened.addfile(tarfile.TarInfo("weights.pt"))
    return buffer.getvalue()


def array():
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 605143884\n"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty: copy or download it again"),
        (LFS, "is a pointer of git-lfs, not the weights: run `git lfs pull` there"),
        (b"\n<!DOCTYPE html><html><title>Log in</title>", "is a web page, not weights"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "is a web page, not weights"),
        (b'{"model_cfg": {}}', "is JSON, not weights"),
        (tarred(), "is a tar archive: unpack it"),
        (gzip.compress(b"x" * 1000), "is compressed: unpack it"),
        (array(), "is a numpy array"),
        (zipped("weights.pt"), "is a zip archive, not a file of torch: unpack it"),
        (zipped("a/data.pkl")[:-30], "is damaged or incomplete"),
        (zipped("a/data.pkl"), "is damaged"),
        (zipped("a/constants.pkl"), "is damaged"),
        (pickle.dumps({"a": 1}), "is a pickle, which could run code"),
        (b"\x01\x02\x03" * 1000, "is not a file of weights (safetensors, torch.save and TorchScript)"),
        (b"\x10" + bytes(7) + b'{"a": 1}        ', "is damaged or incomplete"),
    ],
)  # fmt: skip
def test_what_is_no_file_of_weights_is_named(tmp_path, content, problem):
    file = tmp_path / "weights.pt"
    file.write_bytes(content)
    assert refused(file).startswith(problem)


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_a_file_that_is_not_all_there(saved, state, options, share):
    file = saved({key: value for key, value in state.items() if "token" not in key}, **options)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    assert refused(file).startswith("is damaged")


def test_safetensors_and_archives_that_are_not_all_there(write_clip, archive, tmp_path):
    for whole in (write_clip(**SMALL)[1], archive()):
        content = whole.read_bytes()
        for share in (0.001, 0.5, 0.999):
            (tmp_path / "cut").write_bytes(content[: int(share * len(content))])
            assert refused(tmp_path / "cut").startswith("is damaged or incomplete")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (torch.zeros(3), "has one tensor, not named weights"),
        ([torch.zeros(3)], "has a list, not named weights"),
        ({}, "has no weights in it"),
        ({"state_dict": {}}, "has no weights in it"),
        ({"state": {}, "param_groups": []}, "is the state of an optimizer, not weights"),
        ({"epoch": 1, "net": {"a": torch.zeros(1)}}, "has epoch, net in addition to weights or instead of them"),
        ({"encoders.0.weight": torch.zeros(1), "decoders.0.bias": torch.zeros(1)}, "has the weights of a dictionary"),
        ({"vision_model.embeddings.class_embedding": torch.zeros(1)}, "is a CLIP in the format of transformers"),
        ({f"blocks.{i}.weight": torch.zeros(1) for i in range(9)},
         "has no vision tower of open_clip (visual.…), but blocks.0.weight, blocks.1.weight, blocks.2.weight and 6 "),
    ],
)  # fmt: skip
def test_weights_of_something_else_are_named(saved, content, problem):
    assert refused(saved(content)).startswith(problem)


def test_a_checkpoint_of_a_clt_is_named(clt, tmp_path):
    save_file({key: value.contiguous() for key, value in clt.state_dict().items()}, tmp_path / "clt.safetensors")
    assert refused(tmp_path / "clt.safetensors").startswith("has the weights of a dictionary (a CLT or residual SAEs)")


class Trap:
    """What runs code when it is unpickled."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return open, (self.witness, "w")


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_no_file_runs_code(saved, state, tmp_path, options):
    witness = tmp_path / "witness"
    file = saved({"state_dict": state, "trap": Trap(str(witness))}, **options)
    assert re.match(
        r"has Python objects \((_?io|builtins)\.open\), which could run code when they are read", refused(file)
    )
    assert not witness.exists()
    with torch.serialization.safe_globals([open, io.open]):  # the trap is one
        torch.load(file)["trap"].close()
    assert witness.exists()
    file = saved({"state_dict": state, "args": argparse.Namespace(lr=1)}, **options)
    assert "(argparse.Namespace)" in refused(file)


# Weights that do not fit


def test_what_does_not_fit_is_named_with_both_shapes(write_clip, state, tmp_path):
    _, larger = write_clip(**SMALL, vision_cfg={"image_size": 64})
    assert refused(larger) == (
        "does not fit single: visual.positional_embedding is 65 x 32 in the file and 17 x 32 in single: the shapes "
        "are those of small-64"
    )
    other = {key: value for key, value in state.items() if not key.startswith("visual.transformer.resblocks.2")}
    save_file(other | {"head.weight": torch.zeros(2)}, tmp_path / "other")
    lacking = ("ln_1.weight", "ln_1.bias", "attn.in_proj_weight")
    assert refused(tmp_path / "other") == (
        f"does not fit single: it does not have "
        f"{', '.join(f'visual.transformer.resblocks.2.{key}' for key in lacking)} and 9 "
        "more; single does not have head.weight: give the name of the CLIP that was saved, or "
        "its configuration (`config`)"
    )


def test_published_shapes_are_recognised():
    """As far as a few tensors tell, without making the models."""
    for name in ("ViT-B-32", "ViT-L-14-336"):
        config = open_clip.get_model_config(name)
        with torch.device("meta"):
            state = open_clip.CLIP(**config).state_dict()
        assert name in fitting._remedy(state)
    assert "give the name of the CLIP" in fitting._remedy({})
