"""Insertion and deletion curves: ends, levels and areas, against single runs and by hand."""

import numpy as np
import pytest
import torch
from rich.console import Console

from vitrine.models.dictionary.average import mean_code
from vitrine.models.dictionary.edited import Edited
from vitrine.training.data.held_out import held_out
from vitrine.training.evaluation.curves import FRACTIONS, Curves, _areas, node_faithfulness
from vitrine.training.evaluation.nodes import CltNodes
from vitrine.training.evaluation.rankings import NODE_RANKINGS


@pytest.fixture(scope="module")
def setting(clip, clt, recipe, make_pixels):
    mean = mean_code(clip.tower, clt, [make_pixels(4, seed=9)])
    labels = clip.encode_labels(list(recipe.data.labels), list(recipe.data.templates))
    return labels, mean


def logits(clip, residual, labels):
    embedding = torch.nn.functional.normalize(clip.tower.head(residual), dim=-1)
    return clip.logit_scale * embedding @ labels.T


@torch.no_grad()
def test_points_are_runs_of_the_edited_network(clip, clt, make_pixels, setting):
    labels, mean = setting
    curves = Curves(clip, labels, [CltNodes(clip, clt, mean)])
    images = [make_pixels(1, seed=seed) for seed in (2, 3)]
    for pixels in images:
        curves.update(pixels)
    figures = curves.figures()
    expected = {name: np.zeros((2, len(images), len(FRACTIONS))) for name in NODE_RANKINGS}
    whole = []
    edited = Edited(clip.tower, clt, mean)
    for at, pixels in enumerate(images):
        own = logits(clip, clip.tower(pixels).residual_out[:, 0], labels)[0]
        top1 = int(own.argmax())
        whole.append(float(own[top1] - own.mean()))
        scores, active = curves.kinds[0].rankings(pixels, labels[top1] - labels.mean(0))
        for name in NODE_RANKINGS[:-1]:  # the random one has another number each time
            nodes = active.flatten().nonzero()[:, 0]
            nodes = nodes[scores[name].flatten()[nodes].argsort(descending=True, stable=True)]
            for level, fraction in enumerate(FRACTIONS):
                first = torch.zeros(active.numel(), dtype=torch.bool)
                first[nodes[: round(fraction * len(nodes))]] = True
                first = first.view_as(active)
                for way, mask in enumerate((first, active & ~first)):
                    run = logits(clip, edited(clip.tower.embed(pixels), mask[None]), labels)[0]
                    expected[name][way, at, level] = float(run[top1] - run.mean())
    assert figures.images == 2
    assert figures.above_mean == pytest.approx(np.mean(whole), rel=1e-4)
    for name in NODE_RANKINGS[:-1]:
        curve = figures.curve(name)
        for way, points in enumerate((curve.deletion, curve.insertion)):
            found = [point.above_mean.value for point in points]
            assert found == pytest.approx((expected[name][way].mean(0) / np.mean(whole)).tolist(), abs=1e-4)


def test_nothing_taken_away_is_clip_itself(clip, clt, make_pixels, setting):
    labels, mean = setting
    curves = Curves(clip, labels, [CltNodes(clip, clt, mean)])
    curves.update(make_pixels(1, seed=2))
    for curve in curves.figures().curves:
        for point in (curve.deletion[0], curve.insertion[-1]):
            assert point.above_mean.value == pytest.approx(1, abs=1e-5)
            assert point.stays == 1
        assert curve.deletion[-1] == curve.insertion[0]  # everything is at its mean


def test_areas_by_hand():
    assert _areas(np.array([[1.0, 0.5, 0.0], [1.0, 1.0, 1.0]])).tolist() == [0.5, 1.0]


def test_images_are_those_that_clip_classifies_rightly(clip, clt, recipe, data_root, setting):
    images = held_out(recipe.data, data_root, clip, workers=0)
    labels, mean = setting
    right = sum(
        int((logits(clip, clip.tower(pixels).residual_out[:, 0], labels).argmax(-1) == truth).sum())
        for pixels, truth in images.batches()
    )
    assert 0 < right < len(images)
    kinds = [CltNodes(clip, clt, mean)]
    figures = node_faithfulness(clip, kinds, images, labels, 100, Console(quiet=True))
    assert figures.images == right
    assert node_faithfulness(clip, kinds, images, labels, 1, Console(quiet=True)).images == 1
