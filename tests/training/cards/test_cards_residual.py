"""`vitrine cards` of residual SAEs' features: whose they are, beside a CLT's, and never of other SAEs."""

import shutil
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from vitrine.commands import app
from vitrine.models.bundle.bundle import BundleError, open_bundle
from vitrine.models.bundle.cards import Cards, CardsError
from vitrine.models.bundle.layout import CARD_FILES
from vitrine.models.bundle.sealing import seal
from vitrine.models.dictionary.residual_sae import standardise
from vitrine.models.export.residual import add_residual, has_saes
from vitrine.models.progress import Progress
from vitrine.training.cards.build import CardsBuildError, Options, build_cards
from vitrine.training.cards.vocabulary import NAMED, embed, read_vocabulary

OPTIONS = Options(
    images=20, held_out=4, exemplars=4, codes=10, references=5, vocabulary=("labels", "colours"), workers=0
)
QUIET = Console(quiet=True)
FILES = {f"residual_cards/{name}" for name in CARD_FILES}


def everything(bundle):
    """All cards, by layer and index."""
    features = bundle.manifest.residual.features
    return {
        (layer, index): bundle.residual_cards.card(layer, index)
        for layer, count in enumerate(features)
        for index in range(count)
    }


def test_cards_are_of_the_features_that_fire(carded_residual, residual_export, clip, data_root):
    """The exemplar of a feature, forwarded by itself, has that activation and that mask."""
    transform, shown = clip.transform(), 0
    for (layer, index), card in everything(carded_residual).items():
        for exemplar in card.exemplars[:1]:
            (image,) = carded_residual.residual_cards.images([exemplar.image])
            with Image.open(data_root / image.name) as opened:
                stream = clip.tower.embed(transform(opened.convert("RGB"))[None])
            for block in clip.tower.blocks[: layer + 1]:
                stream = block(stream)
            is_cls = torch.arange(stream.shape[1]) == 0
            code = residual_export.saes.encoders[layer](standardise(stream[0]).x, is_cls)
            fires = (code.values * (code.indices == index)).sum(1)
            read = fires[0] if card.read_at == "cls" else fires[1:].max()
            assert exemplar.activation == pytest.approx(float(read), rel=1e-4)
            mask = np.frombuffer(exemplar.mask, np.uint8) * card.mask_scale / 255
            assert mask == pytest.approx(fires[1:].numpy(), abs=card.mask_scale / 200)
            shown += 1
    assert shown > 60


def test_a_direction_is_the_decoders_through_the_last_norm(carded_residual, residual_export, clip):
    text = carded_residual.manifest.text
    words = read_vocabulary(NAMED, text.labels)
    embeddings = embed(clip, words, text.templates, Progress(QUIET))
    found = 0
    for layer, decoder in enumerate(residual_export.saes.decoders):
        folded = F.normalize(decoder.weight @ torch.from_numpy(np.array(carded_residual.fold, np.float32)), dim=-1)
        for index, scores in enumerate(folded @ embeddings.T):
            card = carded_residual.residual_cards.card(layer, index)
            if card.writes is not None:
                assert card.writes == words[int(scores.argmax())]
                assert card.writes_score == pytest.approx(float(scores.max()), abs=1e-5)
                found += 1
    assert found > 60


def test_each_layer_has_cards_of_its_own_features(carded_residual):
    manifest, cards = carded_residual.manifest, carded_residual.residual_cards
    assert carded_residual.cards is None
    for features, said in (((64, 48), "features that do not exist: 16"), ((48, 63), "112 rows for 111 features")):
        with pytest.raises(CardsError, match=said):
            Cards(carded_residual.path, features, "residual_cards")
    assert manifest.files.keys() >= FILES
    assert cards.card(1, 63).index == 63
    with pytest.raises(KeyError):
        cards.card(0, 48)
    table = everything(carded_residual)
    assert [cards.label(*at) for at in table] == [
        (card.label, card.label_score if card.label else None) for card in table.values()
    ]
    coactive = {(other.layer, other.index) for card in table.values() for other in card.coactive}
    assert {layer for layer, _ in coactive} == {0, 1}
    assert coactive <= table.keys()
    assert manifest.residual_cards.quality.labelled == cards.search(None, None, 0, 1)[0] > 0
    assert manifest.residual_cards.references == len(cards.references[0]) == 0
    assert "## Cards of residual SAEs' features" in (carded_residual.path / "MODEL_CARD.md").read_text()


def test_cards_of_either_kind_stay_when_the_other_is_added(
    carded_residual, checkpoint, sae_checkpoint, clip, data_root, tmp_path
):
    before = carded_residual.manifest
    both = build_cards(clip, checkpoint, carded_residual, data_root, tmp_path / "both", OPTIONS, QUIET)
    assert both.manifest.residual_cards == before.residual_cards
    assert all(both.manifest.files[name] == before.files[name] for name in FILES)
    assert both.manifest.cards.references == 5
    assert both.residual_cards.card(1, 5) == carded_residual.residual_cards.card(1, 5)
    anew = build_cards(clip, sae_checkpoint, both, data_root, tmp_path / "anew", OPTIONS, QUIET)
    assert anew.manifest.cards == both.manifest.cards
    assert anew.manifest.residual_cards.images == 20


def test_an_export_of_saes_leaves_the_cards_of_those_before_out(
    carded_residual, clip, residual_export, tmp_path, monkeypatch
):
    def write(folder, *_):
        for file in carded_residual.path.glob("residual_*.*"):  # an export takes seconds
            shutil.copy(file, folder)
        return carded_residual.manifest.residual

    monkeypatch.setattr("vitrine.models.export.residual.write_residual", write)
    exported = add_residual(carded_residual, clip, residual_export, tmp_path / "exported")
    assert exported.manifest.residual_cards is None
    assert not exported.manifest.files.keys() & FILES
    assert not (exported.path / "residual_cards").exists()


@pytest.mark.parametrize("part", ["encoders", "decoders"])
def test_saes_are_told_from_others(with_residual, residual_export, part):
    assert has_saes(with_residual, residual_export.saes)
    other = deepcopy(residual_export.saes)
    getattr(other, part)[1].weight[3, 5] += 1e-3
    assert not has_saes(with_residual, other)


def test_what_was_not_exported_from_the_checkpoint_is_refused(
    sae_checkpoint, bundle, with_residual, clip, data_root, tmp_path
):
    summary = with_residual.manifest.residual
    budget = with_residual.manifest.model_copy(update={"residual": summary.model_copy(update={"k": (8, 8)})})
    for other in (bundle, replace(with_residual, manifest=budget)):
        with pytest.raises(CardsBuildError, match="the residual SAEs do not match"):
            build_cards(clip, sae_checkpoint, other, data_root, tmp_path / "out", OPTIONS, QUIET)
    assert not list(tmp_path.iterdir())


def test_there_are_no_cards_without_saes(carded_residual, bundle, tmp_path):
    manifest = bundle.manifest.model_copy(update={"residual_cards": carded_residual.manifest.residual_cards})
    path = tmp_path / "copy"
    path.mkdir()
    with pytest.raises(BundleError, match="residual_cards are given, but there are no residual SAEs"):
        seal(path, manifest)


def test_the_command(sae_checkpoint, with_residual, data_root, tmp_path):
    arguments = ["cards", "--checkpoint", sae_checkpoint, "--bundle", with_residual.path, "--data-root", data_root]
    options = ["--images", 20, "--vocabulary", "labels", "--vocabulary", "colours", "--workers", 0]
    result = CliRunner().invoke(app, [str(a) for a in [*arguments, "--out", tmp_path / "out", *options]])
    assert result.exit_code == 0, result.output
    assert "features of residual SAEs have a label" in result.output
    assert open_bundle(tmp_path / "out").manifest.residual_cards.vocabulary == 22
