"""What would have to go for another label to come first: a few features, or patches.

Greedily: the source account of (the label that comes first now - the label asked for) says what argues most against it;
that is taken out, and the network runs again, which proves or refutes it; and so on. Accounts are computed again after
every few steps. At the end each member is put back, and stays out only if the label does not come first with it.

Features are ablated at all tokens in the running network (`mode: rerun`); their accounts are of the network as it is,
of the difference from whichever label comes first by then. Patches are painted over with the preprocessing's mean
colour, and the network itself runs on that picture; their accounts are of that picture, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import monotonic
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account import ledger
from vitrine.models.account.ledger import Decomposition
from vitrine.models.account.sources import Trace, accounts
from vitrine.models.bundle.bundle import Bundle
from vitrine.models.bundle.manifest import patch_grid
from vitrine.models.interventions.changes import resolve
from vitrine.models.interventions.spec import Intervention
from vitrine.service.answers.attributor import Attributor, Inferred
from vitrine.service.schemas.intervene import Counterfactual, CounterfactualAnswer, Member, Step

FROM_ONE_ACCOUNT = 4  # members taken out before the next account

Key = tuple[int, ...]  # (layer, index) of a feature, (token,) of a patch
Stopped = Literal["members", "seconds", "nothing left"]


class Kind(Protocol):
    """What can be taken out."""

    def ranked(self, out: Sequence[Key], direction: NDArray[np.floating]) -> list[Key]:
        """What makes s <direction [D], z/|z|> larger, with `out` taken out, the largest contribution first."""

    def without(self, out: Sequence[Key]) -> Decomposition:
        """The image with these taken out."""

    def edits(self, out: Sequence[Key]) -> list[Intervention]:
        """The same as interventions, where they are."""


class Features:
    """Of the CLT."""

    def __init__(self, attributor: Attributor, pixels: NDArray[np.float32]) -> None:
        self.engine, self.pixels, self.network = attributor.engine, pixels, attributor.network
        self.trace: Trace | None = None

    def ranked(self, out: Sequence[Key], direction: NDArray[np.floating]) -> list[Key]:
        graphs, bundle = self.engine.sources, self.engine.bundle
        assert graphs is not None  # as below: `service.answers.intervene` has checked it
        self.trace = self.trace or graphs.trace(self.pixels)
        outputs = graphs.of_directions(self.trace, direction[None])
        (account,) = accounts(self.trace, outputs, direction[None], bundle.beta, bundle.manifest.logit_scale)
        layers, indices, contributions = account.by_feature()
        found = zip(layers.tolist(), indices.tolist(), strict=True)
        return [key for key, value in zip(found, contributions, strict=True) if value > 0 and key not in out]

    def without(self, out: Sequence[Key]) -> Decomposition:
        rerun = self.engine.rerun
        assert rerun is not None
        (parts,) = rerun.run(self.pixels[None], [resolve(self.edits(out), self.network, "rerun")])
        return parts

    def edits(self, out: Sequence[Key]) -> list[Intervention]:
        return [Intervention(op="ablate", layer=layer, index=index) for layer, index in out]


class Patches:
    """Of the picture."""

    def __init__(self, attributor: Attributor, pixels: NDArray[np.float32]) -> None:
        self.engine, self.pixels = attributor.engine, pixels
        manifest = attributor.bundle.manifest
        self.grid = patch_grid(manifest.preprocessing, manifest.shape.tokens - 1)

    def ranked(self, out: Sequence[Key], direction: NDArray[np.floating]) -> list[Key]:
        graphs = self.engine.sources
        assert graphs is not None
        _, account = graphs.target(self._painted(out), direction[None])
        order = np.argsort(-account.map[1:], kind="stable")
        return [(token,) for token in (order + 1).tolist() if account.map[token] > 0 and (token,) not in out]

    def without(self, out: Sequence[Key]) -> Decomposition:
        return self.engine.explain(self._painted(out)[None])[0]

    def edits(self, out: Sequence[Key]) -> list[Intervention]:
        return []

    def _painted(self, out: Sequence[Key]) -> NDArray[np.float32]:
        """The pixels [3, H, W] with patches in the mean colour, which is 0."""
        pixels, (rows, columns) = self.pixels.copy(), self.grid
        height, width = pixels.shape[1] // rows, pixels.shape[2] // columns
        for (token,) in out:
            row, column = divmod(token - 1, columns)
            pixels[:, row * height : (row + 1) * height, column * width : (column + 1) * width] = 0
        return pixels


class _Standing(NamedTuple):
    """Where the label asked for stands."""

    first: int
    probability: float
    lead: float


async def search(
    attributor: Attributor, inferred: Inferred, asked: Counterfactual
) -> tuple[CounterfactualAnswer, list[Intervention], Decomposition | None]:
    """(answer, the members as interventions, the image without them; None if none were found)."""
    async with attributor.one_circuit:  # as with circuits: seconds of the engine's time
        return await _Search(attributor, inferred, asked).run()


class _Search:
    def __init__(self, attributor: Attributor, inferred: Inferred, asked: Counterfactual) -> None:
        self.attributor, self.asked, self.labels = attributor, asked, inferred.labels
        kind = Features if asked.of == "features" else Patches
        self.kind: Kind = kind(attributor, inferred.pixels)
        self.wanted = self.labels.labels.index(asked.label)
        self.parts, self.members, self.path = inferred.parts, list[Key](), list[Step]()
        self.until, self.spent = monotonic() + asked.seconds, 0.0

    async def run(self) -> tuple[CounterfactualAnswer, list[Intervention], Decomposition | None]:
        stopped = await self._forward()
        minimal = stopped is None and await self._backward()
        members, bundle = self.members if stopped is None else [], self.attributor.bundle
        rows, columns = patch_grid(bundle.manifest.preprocessing, bundle.manifest.shape.tokens - 1)
        answer = CounterfactualAnswer(
            label=self.asked.label,
            of=self.asked.of,
            found=stopped is None,
            stopped=stopped,
            members=[_member(bundle, key) for key in members],
            minimal=minimal,
            path=self.path,
            rows=rows,
            columns=columns,
        )
        return answer, self.kind.edits(members), self.parts if stopped is None else None

    async def _forward(self) -> Stopped | None:
        """Take out one after another until the label comes first; None: it does."""
        standing = self._standing(self.parts)
        while standing.first != self.wanted:
            direction = self.labels.embeddings[standing.first] - self.labels.embeddings[self.wanted]
            ranked = await self._between(self.kind.ranked, self.members, direction)
            if not ranked:
                return "nothing left"
            for key in ranked[:FROM_ONE_ACCOUNT]:
                if len(self.members) == self.asked.members:
                    return "members"
                if monotonic() > self.until:
                    return "seconds"
                self.members.append(key)
                self.parts = await self._between(self.kind.without, self.members)
                standing = self._standing(self.parts)
                self.path.append(
                    Step(
                        member=_member(self.attributor.bundle, key),
                        top1=self.labels.labels[standing.first],
                        probability=standing.probability,
                        lead=standing.lead,
                    )
                )
                if standing.first == self.wanted:
                    return None
        return None

    async def _backward(self) -> bool:
        """Put back what need not be out, one after another; whether there was time for all.

        Repeated until nothing can be put back, since what was needed may not be once others are back.
        """
        put_back = True
        while put_back:
            put_back = False
            for key in list(self.members):
                if monotonic() > self.until:
                    return False
                fewer = [other for other in self.members if other != key]
                parts = await self._between(self.kind.without, fewer)
                if self._standing(parts).first == self.wanted:
                    self.members, self.parts, put_back = fewer, parts, True
        return True

    async def _between(self, function: Any, *args: Any) -> Any:
        """A piece of work on the engine's thread, between other requests' batches."""
        self.spent += 1
        return await self.attributor.batcher.run_between(function, *args, spent=self.spent)

    def _standing(self, parts: Decomposition) -> _Standing:
        scale, wanted = self.attributor.bundle.manifest.logit_scale, self.wanted
        values = ledger.logits(parts.embedding, self.labels.embeddings, scale)
        others = np.delete(values, wanted)
        return _Standing(
            first=int(values.argmax()),
            probability=float(ledger.probabilities(values)[wanted]),
            lead=float(values[wanted] - others.max()) if len(others) else 0.0,
        )


def _member(bundle: Bundle, key: Key) -> Member:
    if len(key) == 1:
        return Member(layer=None, index=None, token=key[0])
    layer, index = key
    label, score = bundle.cards.label(layer, index) if bundle.cards else (None, None)
    return Member(layer=layer, index=index, token=None, label=label, label_score=score)
