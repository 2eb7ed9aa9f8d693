"""Labels of a survey made by hand: 6 words, 240 features, each firing on the images of one word, or on random ones."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vitrine.training.cards.describe import describe_features
from vitrine.training.cards.survey import CLS, LOG_BINS, PATCHES, Survey

WORDS, FEATURES, IMAGES, CODES, HELD_OUT, EXEMPLARS, WIDTH = 6, 240, 600, 480, 240, 8, 16
RANDOM = range(180, 240)  # features that fire on random images
LIARS = range(140, 180)  # on the odd held-out images they fire where they should not
AT_PATCHES = range(0, 240, 4)  # features that never fire at [CLS]


@pytest.fixture(scope="module")
def words():
    return F.normalize(torch.eye(WORDS, WIDTH) - torch.eye(WORDS, WIDTH).mean(0), dim=-1)


@pytest.fixture(scope="module")
def survey(words):
    """Embeddings lie far from the origin, as CLIP's do: with their mean in them, all images are alike."""
    generator = np.random.default_rng(0)
    count = IMAGES + HELD_OUT
    shows = np.concatenate([np.arange(IMAGES) % WORDS, np.arange(HELD_OUT) // 2 % WORDS])
    offset = torch.zeros(WIDTH)
    offset[2] = 5.0
    noise = torch.from_numpy(generator.normal(size=(count, WIDTH)).astype(np.float32))
    embeddings = F.normalize(words[shows] + 0.1 * noise + offset, dim=-1)
    images = np.stack(
        [generator.choice(np.flatnonzero(shows[:IMAGES] == f % WORDS), EXEMPLARS, False) for f in range(FEATURES)]
    )
    images[list(RANDOM)] = generator.integers(0, IMAGES, (len(RANDOM), EXEMPLARS))
    fires = shows[:, None] == np.arange(FEATURES) % WORDS
    fires[:, list(RANDOM)] = generator.random((count, len(RANDOM))) < 0.3
    fires[:, list(AT_PATCHES)] ^= generator.random((count, len(AT_PATCHES))) < 0.02
    fires[IMAGES + 1 :: 2, list(LIARS)] ^= True
    at_patches = np.isin(np.arange(FEATURES), AT_PATCHES)
    counts = torch.full((2, 1, FEATURES), 100)
    counts[CLS, 0, at_patches] = EXEMPLARS - 1
    kept = torch.from_numpy(images).int()[None, None].repeat(2, 1, 1, 1)
    kept[CLS, 0, at_patches] = 0  # must not be read
    kept[PATCHES, 0, ~at_patches] = 0
    both = np.stack([np.where(at_patches, False, fires), np.where(at_patches, fires, False)], 1)
    fired = torch.from_numpy(np.packbits(both, axis=-1, bitorder="little"))[:, :, None]
    return Survey(
        seen=torch.tensor(count),
        fires=counts,
        bins=torch.zeros(2, 1, FEATURES, LOG_BINS, dtype=torch.int32),
        values=torch.ones(2, 1, FEATURES, EXEMPLARS),
        images=kept,
        masks=torch.zeros(2, 1, FEATURES, EXEMPLARS, 4, dtype=torch.float16),
        embeddings=embeddings,
        classes=torch.zeros(count, dtype=torch.int32),
        code_indices=torch.zeros(0, 1, 1, dtype=torch.int32),
        code_values=torch.zeros(0, 1, 1, dtype=torch.float16),
        fired=fired[:CODES],
        fired_held_out=fired[IMAGES:],
    )


@pytest.fixture(scope="module")
def described(survey, words):
    generator = np.random.default_rng(1)
    directions = torch.from_numpy(generator.normal(size=(1, FEATURES, WIDTH)).astype(np.float32))
    return describe_features(survey, directions, torch.eye(WIDTH), words, seed=0)


def test_features_are_read_where_they_fire(described):
    read = described.reading.flatten()
    assert [feature for feature in range(FEATURES) if read[feature] == PATCHES] == list(AT_PATCHES)


def test_features_that_fire_on_one_words_images_are_labelled_so(described):
    meaningful = np.array([feature for feature in range(FEATURES) if feature not in RANDOM])
    assert described.label.word[meaningful].tolist() == (meaningful % WORDS).tolist()
    assert described.labelled[meaningful].mean() > 0.8


def test_features_that_fire_on_random_images_are_not(described):
    assert not described.labelled[list(RANDOM)].any()


def test_a_label_is_measured_on_images_that_did_not_calibrate_it(described):
    """The liars passed calibration on the even held-out images; the odd ones expose them."""
    honest = [feature for feature in range(140) if described.labelled[feature]]
    assert described.labelled[list(LIARS)].any()
    assert (described.auroc[honest] > 0.85).all()
    assert (described.auroc[list(LIARS)] < 0.2).all()
    quality = described.quality
    assert (quality.labelled, quality.measured) == (described.labelled.sum(), described.labelled.sum())
    expected = (described.auroc[described.labelled] >= 0.8).mean()
    assert quality.auroc_share == pytest.approx(expected)
    assert quality.auroc_share < 1
    assert quality.auroc_share_shuffled < 0.4
    assert quality.held_out_images == HELD_OUT // 2


def test_each_reading_has_its_own_thresholds(described):
    assert np.isfinite(described.thresholds).all()
    assert described.thresholds[CLS] != described.thresholds[PATCHES]


def test_clarity_is_that_of_the_exemplars(described):
    meaningful = np.array([feature for feature in range(FEATURES) if feature not in RANDOM])
    assert described.clarity[meaningful].min() > described.clarity[list(RANDOM)].max() + 0.1
