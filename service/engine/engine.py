"""Runs the bundle's graphs in ONNX Runtime. Independent of labels and HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account.ledger import Decomposition
from vitrine.models.bundle.bundle import Bundle
from vitrine.models.bundle.layout import (
    COMPONENTS,
    DETAILS,
    DETAILS_INPUT,
    HEAD_COMPONENTS,
    MLP_ROWS,
    VISION_OUTPUTS,
    given,
    vision_file,
)
from vitrine.models.interventions.spec import Mode
from vitrine.service.engine.fit import check_graph, text_graph, vision_graph
from vitrine.service.engine.precision import check_precision
from vitrine.service.engine.replacement import ReplacementGraph
from vitrine.service.engine.rerun import RerunGraphs
from vitrine.service.engine.residual import ResidualGraphs
from vitrine.service.engine.runtime import PROVIDERS, Runtime, choose, open_session, session_errors
from vitrine.service.engine.sources import SourceGraphs
from vitrine.service.engine.text_groups import TextGroups
from vitrine.service.operations.settings import Settings


class Engine:
    """Runs a bundle's graphs. Thread-safe, but most efficient when used by one thread at a time.

    Raises `EngineError` if the settings cannot be satisfied (`service.engine.runtime`) or the precision is wrong on
    this machine (`service.engine.precision`), `BundleError` if the graphs do
    not fit the manifest (`service.engine.fit`) or are no longer the files that were verified.
    """

    def __init__(self, bundle: Bundle, settings: Settings, runtime: Runtime | None = None) -> None:
        """runtime: overrides the choice made from the settings."""
        self.bundle = bundle
        self.runtime = runtime or choose(bundle, settings)
        self.vision = open_session(bundle.path / vision_file(self.runtime.precision), self.runtime)
        self.text = open_session(bundle.path / "text.onnx", self.runtime)
        # opened with the first request that needs them
        can_replace = bundle.has_replacement and settings.replacement
        self.replacement = ReplacementGraph(bundle, self.runtime) if can_replace else None
        self.sources = SourceGraphs(bundle, self.runtime) if bundle.has_sources and settings.sources else None
        self.residual = ResidualGraphs(bundle, self.runtime) if bundle.has_residual and settings.residual else None
        self.rerun = RerunGraphs(bundle, self.runtime) if bundle.has_rerun and settings.rerun else None
        outputs = {output.name for output in self.vision.get_outputs()}
        self.has_components = COMPONENTS in outputs
        always = (*VISION_OUTPUTS, MLP_ROWS) if MLP_ROWS in outputs else VISION_OUTPUTS
        self._always = given(always, bundle.manifest.has_features)
        bundle.check_unchanged()  # ONNX Runtime opens the graphs, and what they refer to, by path
        self._check()
        check_precision(bundle, self.vision, self.runtime)
        self.on_gpu = self.provider != PROVIDERS["cpu"]
        self.batches = _batches(settings.batch_size, self.on_gpu)
        any_length = not isinstance(self.text.get_inputs()[0].shape[1], int)  # else a name
        text = bundle.manifest.text
        self.text_groups = TextGroups(text.context, text.pad, any_length, self.on_gpu)

    def _check(self) -> None:
        manifest = self.bundle.manifest
        check_graph(
            self.bundle,
            vision_graph(
                manifest, self.runtime.precision, self.has_details, self.has_components, MLP_ROWS in self._always
            ),
            self.vision,
        )
        check_graph(self.bundle, text_graph(manifest), self.text)

    @property
    def provider(self) -> str:
        """ONNX Runtime's name for the provider in use."""
        return self.vision.get_providers()[0]

    @property
    def has_details(self) -> bool:
        """Whether the bundle provides `Details`; bundles of older versions do not."""
        return self.bundle.attention_fold is not None

    @property
    def heads(self) -> int:
        """Attention heads of a layer, as the vision graph says; 0: it has no `Details`."""
        outputs = {output.name: output.shape for output in self.vision.get_outputs()}
        return int(outputs["attention_weights"][2]) if self.has_details else 0

    @property
    def interventions(self) -> list[Mode]:
        """How interventions can be made; empty in bundles of older versions, which are to be exported again."""
        ways: dict[Mode, bool] = {
            "direct": self.has_components and self.has_details,
            "rerun": self.rerun is not None,
        }
        return [mode for mode, can in ways.items() if can]

    def explain(
        self, pixels: NDArray[np.float32], details: Sequence[bool] = (), components: Sequence[bool] = ()
    ) -> list[Decomposition]:
        """Decompositions of normalised pixels [B, 3, H, W] (`models.account.ledger`), one per image.

        details: for which images to compute `Decomposition.details`, with what each head wrote where the bundle has it.
        components: for which images `Decomposition.components` are needed; they come for all or for none.
        """
        count = len(pixels)
        if self.on_gpu and (size := min((size for size in self.batches if size >= count), default=0)):
            pixels = np.concatenate([pixels, np.zeros((size - count, *pixels.shape[1:]), np.float32)])
        names, feeds = [*self._always], {"pixels": pixels}
        if self.has_details:
            feeds[DETAILS_INPUT] = np.array(any(details))
        if any(details):
            names += DETAILS
            names += [HEAD_COMPONENTS] * self.has_components
        if any(components):
            names.append(COMPONENTS)
        outputs = dict(zip(names, self.vision.run(names, feeds), strict=True))
        with_details = details or [False] * count
        return [Decomposition.from_batch(outputs, image, with_details[image]) for image in range(count)]

    def encode_text(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """Unit text embeddings [N, D] of tokens [N, T]; T is the context, or less if the graph takes any length."""
        return self.text.run(["text_embedding"], {"tokens": tokens})[0]

    def encode_texts(self, texts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Unit text embeddings [N, D] of a group of texts (`TextGroups.divide`), each a list of at most as many tokens
        as the context has."""
        tokens = self.text_groups.pad(texts)
        start = perf_counter()
        embeddings = self.encode_text(tokens)
        self.text_groups.record(tokens.size, perf_counter() - start)
        return embeddings[: len(texts)]

    @session_errors("a graph of this bundle, run with a batch of VITRINE_BATCH_SIZE images,")
    def warm_up(self) -> None:
        """Run the graphs once at every relevant size, so that no request pays for it, and learn the text encoder's
        pace; the graphs that few requests need run when they are opened. Raises `EngineError`."""
        manifest = self.bundle.manifest
        for batch in self.batches:
            pixels = np.zeros((batch, 3, *manifest.preprocessing.size), np.float32)
            self.explain(pixels)
            if self.has_details:
                self.explain(pixels, [True] * batch)
        start = perf_counter()
        self.explain(pixels[:1])
        self.text_groups.give_way_to(perf_counter() - start)
        for texts in self.text_groups.warm_up():
            self.encode_texts(texts)


def _batches(largest: int, on_gpu: bool) -> list[int]:
    """The batch sizes to warm up. On a GPU, which plans again for each new size, no others are used.

    On a GPU: powers of two and the largest. On the CPU, where any size works: one and the largest.
    """
    smaller = [2**power for power in range(largest.bit_length()) if 2**power < largest] if on_gpu else [1]
    return sorted({*smaller, largest})
