"""A network of four features that can be followed by hand, with the calls of an engine: one of them is a cue.

Of a picture of 4 x 4 pixels, with its colours as sent (0 to 1):

    0/0  the cue: green of the border, at the patch       -> writes CUE_WEIGHT to label a
    0/3  blue of the border, at the patch                 -> writes to neither
    1/1  red of the middle, at [CLS]                      -> writes 1 to label a
    1/2  1 - red of the middle, at [CLS]                  -> writes 1 to label b
"""

from types import SimpleNamespace

import numpy as np
from PIL import Image

from vitrine.models.account.sources import Sources, Trace
from vitrine.models.bundle.manifest import Preprocessing
from vitrine.models.interventions.changes import InterventionError

CUE_WEIGHT = 0.5
LAYERS, FEATURES, TOKENS = 2, 4, 2
SCALE = 10.0
WRITES = np.zeros((LAYERS, FEATURES, 3))  # to label a, to label b, to neither
WRITES[0, 0, 0], WRITES[0, 3, 2], WRITES[1, 1, 0], WRITES[1, 2, 1] = CUE_WEIGHT, 0.2, 1, 1
TEXTS = {"a": [1, 0, 0], "b": [0, 1, 0], "green border": [0.8, 0, 0.6], "a with green border": [0.96, 0, 0.28]}
TEXTS |= {"b with green border": [0.6, 0.8, 0]}


def picture(red, green, blue):
    """Red of the middle, green and blue of the border, 0 to 255."""
    image = Image.new("RGB", (4, 4), (0, green, blue))
    image.paste((red, 0, 0), (1, 1, 3, 3))
    return image


def activations(pixels):
    """[L, F, T] of one picture [3, 4, 4]."""
    border = np.ones((4, 4), bool)
    border[1:3, 1:3] = False
    z = np.zeros((LAYERS, FEATURES, TOKENS))
    red = pixels[0, ~border].mean()
    z[0, 0, 1], z[0, 3, 1], z[1, 1, 0], z[1, 2, 0] = pixels[1, border].mean(), pixels[2, border].mean(), red, 1 - red
    return z


def embedding(z):
    written = np.einsum("lft,lfd->d", z, WRITES)
    return written / np.linalg.norm(written), np.linalg.norm(written)


class Graphs:
    """`SourceGraphs`; every feature has a place, used or not."""

    def __init__(self, bundle):
        self.bundle = bundle

    def trace(self, pixels):
        z = activations(pixels)
        unit, norm = embedding(z)
        indices = np.broadcast_to(np.arange(FEATURES), (LAYERS, TOKENS, FEATURES))
        nothing = np.zeros((LAYERS, TOKENS))
        return Trace(
            unit, norm, norm, nothing, nothing, nothing, nothing[0], nothing[..., None], indices, z.transpose(0, 2, 1)
        )

    def target(self, pixels, direction):
        trace = self.trace(pixels)
        return trace, self.of_stream(trace, direction[0] * SCALE / trace.norm)

    def of_stream(self, trace, vector):
        given = np.einsum("ltf,lfd,d->ltf", trace.values, WRITES, vector)
        nothing = np.zeros((LAYERS, TOKENS))
        return Sources(0.0, nothing[0], given, nothing[:, 0], nothing, 0.0, trace.indices)


class Engine:
    batches = (1, 8)

    def __init__(self):
        preprocessing = Preprocessing(
            size=(4, 4), mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), interpolation="bicubic", resize_mode="shortest"
        )
        shape = SimpleNamespace(layers=LAYERS, features=FEATURES)
        manifest = SimpleNamespace(shape=shape, has_features=True, logit_scale=SCALE, preprocessing=preprocessing)
        self.bundle = SimpleNamespace(
            manifest=manifest, beta=np.zeros(3), cards=None, digest="sha256:toy", path="toy bundle"
        )
        self.sources = Graphs(self.bundle)


class Encoder:
    def encode(self, labels, templates):
        return np.array([TEXTS[label] for label in labels], np.float32)


class Network:
    layers, tokens, heads, width = LAYERS, TOKENS, 1, 3

    def features(self, dictionary, layer):
        return FEATURES

    def means(self, *_):
        raise InterventionError("the toy has no mean activations")

    def direction(self, dictionary, layer, index, kind):
        return WRITES[layer, index]

    def mean_stream(self, at):
        raise InterventionError("the toy has no mean stream")


class Runner:
    modes, network = ("rerun",), Network()

    def plain(self, pixels):
        found = [activations(one) for one in pixels]
        streams = [np.einsum("lft,lfd->d", z, WRITES) for z in found]
        return np.stack([embedding(z)[0] for z in found]), np.stack(streams)

    def embeddings(self, pixels, changes, mode):
        found = []
        for one in pixels:
            z = activations(one)
            for layer, index, gain, offset in zip(
                changes.layers, changes.indices, changes.gains, changes.offsets, strict=True
            ):
                z[layer, index] += gain * z[layer, index] + offset
            written = np.einsum("lft,lfd->d", z, WRITES)
            directed = zip(
                changes.places, changes.directions, changes.direction_gains, changes.direction_offsets, strict=True
            )
            for place, direction, gain, offset in directed:
                if place == LAYERS:
                    written = written + (gain[0] * (written @ direction) + offset[0]) * direction
            found.append(written)
        return np.stack(found)
