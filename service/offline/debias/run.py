"""All of it, one after the other: groups, ranking, search, and the held-out half."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account.ledger import Array
from vitrine.models.bundle.bundle import Bundle
from vitrine.models.groups import Judge
from vitrine.models.interventions.spec import Intervention, Mode
from vitrine.service.engine.engine import Engine
from vitrine.service.offline.debias.candidates import DIRECTION, Candidate, Feature, Found
from vitrine.service.offline.debias.comparison import Comparison
from vitrine.service.offline.debias.contributions import Contributions, contributions, contributions_along
from vitrine.service.offline.debias.cue import in_words
from vitrine.service.offline.debias.directions import cell_mean, directions, drawn
from vitrine.service.offline.debias.errors import DebiasError
from vitrine.service.offline.debias.examples import Examples, check_halves
from vitrine.service.offline.debias.firing import Firing, firing, some_of_each
from vitrine.service.offline.debias.pictures import Pictures
from vitrine.service.offline.debias.question import Encoder, Question, Texts, encode
from vitrine.service.offline.debias.ranking import Contrast, Place, contrasts, effects, rank
from vitrine.service.offline.debias.report import Method, RankedDirection, Report, TrialRow
from vitrine.service.offline.debias.runner import Runner, edited
from vitrine.service.offline.debias.search import COUNTS, Half, Search, candidates, conditioned, search
from vitrine.service.offline.debias.shown import direction_shown, shown
from vitrine.service.offline.debias.unlabelled import by_errors

Track = Callable[[Sequence[Any], str], Iterable[Any]]
# of each pair of labels the finding half's images that are of it, and their contributions
Given = dict[tuple[int, int], tuple[NDArray[np.int64], Contributions]]
WITH_CUE = ("without the cue", "with the cue")
NO_CUE = "Orth-Proj and Orth-Cali require the cue in words; give --cue"


def check_features(bundle: Bundle) -> None:
    """Raise `DebiasError` for a bundle without a CLT."""
    if not bundle.manifest.has_features:
        raise DebiasError(f"debiasing requires a CLT: {bundle.manifest.why_no_features}")


class Debias:
    """A question about a bundle's CLIP."""

    def __init__(
        self,
        engine: Engine,
        encoder: Encoder,
        runner: Runner,
        pictures: Pictures,
        question: Question,
        track: Track,
    ) -> None:
        """track: yields what it is given, and may show progress under a title. Raises `DebiasError`."""
        check_features(engine.bundle)
        if engine.sources is None:
            raise DebiasError(
                f"{engine.bundle.path} has no source accounts, which are needed to rank features; export it with "
                "`bundle.sources`, and do not set VITRINE_SOURCES=false"
            )
        self.engine, self.sources, self.encoder, self.runner = engine, engine.sources, encoder, runner
        self.pictures, self.question, self.track = pictures, question, track
        self.batch = max(engine.batches)

    def __call__(self, examples: Examples) -> Report:
        """Raises `DebiasError` where these images, labels or groups do not do."""
        start, question = perf_counter(), self.question
        usable, unreadable = self.pictures.readable(examples.images)
        examples = examples.only(usable)
        check_halves(examples)
        texts = encode(self.encoder, examples.label_names, question)
        embeddings, streams = self._plain(examples.images)
        examples, kept = self._grouped(examples, embeddings, texts)
        embeddings, streams = embeddings[kept], streams[kept]
        logits = self._logits(embeddings, texts)
        finding, held_out = np.flatnonzero(examples.finding), np.flatnonzero(~examples.finding)
        half = examples.only(finding)
        if (logits[finding].argmax(-1) == half.labels).all():
            raise DebiasError(
                f"all {len(half):,} images of the finding half are predicted correctly, so there is nothing to repair"
            )
        compared = contrasts(half, logits[finding])
        given = {contrast.pair: self._given(half, contrast.pair, texts) for contrast in compared}
        ranking = self._rank(half, compared, given)
        found = self._found(half, streams[finding], compared, ranking)
        sought = self._search(half, logits[finding], texts, found)
        others = examples.only(held_out)
        methods, left_out = self._compare(half, others, embeddings[held_out], texts, sought, found, given)
        chosen = sought.best.candidate if sought.best else None
        return Report(
            bundle=self.engine.bundle.digest,
            labels=list(examples.label_names),
            templates=list(question.templates),
            cue=list(question.cue),
            others=list(question.others),
            groups_by=question.by,
            groups=list(examples.group_names),
            finding_images=len(half),
            held_out_images=len(held_out),
            unreadable=unreadable,
            ranking=shown(self.engine.bundle, ranking[: question.shown], half, compared, given, question.seed),
            directions=self._directions(half, compared, logits[finding], texts, found),
            interventions=list(chosen.interventions(found)) if chosen else [],
            condition=chosen.condition if chosen else None,
            mode=chosen.mode if chosen else None,
            proposed=chosen.title if chosen else None,
            tried=sought.tried,
            trials=[TrialRow.of(trial) for trial in sought.trials],
            refused=sought.refused,
            methods=methods,
            left_out=left_out,
            seconds=perf_counter() - start,
        )

    def _plain(self, images: Sequence[str]) -> tuple[Array, Array]:
        """(unit embeddings [n, D], streams at [CLS] after the last block [n, d])."""
        found = []
        for batch in self.track([images[at : at + self.batch] for at in range(0, len(images), self.batch)], "predict"):
            found.append(self.runner.plain(np.stack([self.pictures.pixels(image) for image in batch])))
        embeddings, streams = (np.concatenate(part) for part in zip(*found, strict=True))
        return embeddings, streams

    def _grouped(self, examples: Examples, embeddings: Array, texts: Texts) -> tuple[Examples, NDArray[np.int64]]:
        """(images in groups, which these are). Raises `DebiasError` where there are none to compare."""
        if self.question.by == "cue":
            has_cue = in_words(embeddings, examples.labels, texts.cue, texts.others)
            return examples.with_groups(has_cue.astype(np.int64), WITH_CUE), np.arange(len(examples))
        if self.question.by == "errors":
            return self._by_errors(examples, self._logits(embeddings, texts), texts)
        examples.check_groups()
        return examples, np.arange(len(examples))

    def _by_errors(self, examples: Examples, logits: Array, texts: Texts) -> tuple[Examples, NDArray[np.int64]]:
        """Images of the two labels that are mistaken for one another most, in groups by what moves these errors."""
        predicted, truth = logits.argmax(-1), examples.labels
        mistaken = np.zeros((len(texts.labels),) * 2)
        wrong = examples.finding & (predicted != truth)
        np.add.at(mistaken, (np.minimum(truth, predicted)[wrong], np.maximum(truth, predicted)[wrong]), 1)
        first, second = divmod(int(mistaken.argmax()), len(mistaken))
        if not wrong.any():
            raise DebiasError("no image of the finding half is predicted wrongly, so there is nothing to repair")
        members, given = self._given(examples, (first, second), texts)
        some = examples.only(members)
        is_first, predicted_first = some.labels == first, logits[members, first] > logits[members, second]
        half = np.flatnonzero(some.finding)
        score = by_errors(given.only(half), is_first[half], predicted_first[half])
        return some.with_groups(score.has_cue(given, is_first).astype(np.int64), WITH_CUE), members

    def _given(self, half: Examples, pair: tuple[int, int], texts: Texts) -> tuple[NDArray[np.int64], Contributions]:
        """(images of a pair of labels, what each feature gave to the first rather than the second)."""
        members = np.flatnonzero(np.isin(half.labels, pair))
        images = [half.images[member] for member in members.tolist()]
        direction = texts.labels[pair[0]] - texts.labels[pair[1]]
        tracked = self.track(images, f"features, {half.label_names[pair[0]]} or {half.label_names[pair[1]]}")
        return members, contributions(self.sources, self.pictures, tracked, [direction] * len(images))

    def _rank(
        self,
        half: Examples,
        compared: Sequence[Contrast],
        given: Given,
    ) -> list[Place]:
        of_contrasts = []
        for contrast in compared:
            members, of_images = given[contrast.pair]
            is_first, has_cue = half.labels[members] == contrast.pair[0], half.groups[members] == contrast.group
            of_contrasts.append(effects(of_images, is_first, has_cue))
        return rank(of_contrasts, max(self.question.shown, COUNTS[-1]))

    def _feature(self, key: int) -> Feature:
        layer, index = divmod(key, self.engine.bundle.manifest.shape.features)
        return Feature(layer, index)

    def _found(self, half: Examples, streams: Array, compared: Sequence[Contrast], ranking: Sequence[Place]) -> Found:
        """What edits can be made of."""
        features = [self._feature(place.key) for place in ranking]
        groups = list(dict.fromkeys(contrast.group for contrast in compared))
        return Found(
            features=features,
            firings=self._firings(half, features),
            directions=directions(streams, half.labels, half.groups, groups),
            middle=cell_mean(streams, half.labels, half.groups),
            layers=self.engine.bundle.manifest.shape.layers,
        )

    def _firings(self, half: Examples, features: Sequence[Feature]) -> list[Firing]:
        if not features:
            return []
        some = half.only(some_of_each(half.cells))
        images = self.track(some.images, "where features fire")
        return firing(self.sources, self.pictures, images, some.cells, [(one.layer, one.index) for one in features])

    def _search(self, half: Examples, before: Array, texts: Texts, found: Found) -> Search:
        def logits(candidate: Candidate, images: NDArray[np.int64]) -> Array:
            return self._under(candidate.interventions(found), candidate.mode, half.only(images).images, texts)

        def track(some: Sequence[Candidate]) -> Iterable[Candidate]:
            return self.track(some, "edits")

        tried = candidates(self.runner.modes, len(found.features), len(found.directions), self.question.ops)
        return search(logits, Half(half.labels, half.cells, before), tried, self.question.cap, track)

    def _directions(
        self, half: Examples, compared: Sequence[Contrast], before: Array, texts: Texts, found: Found
    ) -> list[RankedDirection]:
        """What the directions do to the logits, and what writes along them."""
        rows, pairs = [], {contrast.group: contrast.pair for contrast in compared}
        for one in found.directions:
            edit = Candidate(DIRECTION, 1, "direct").interventions(replace(found, directions=[one]))
            taken, pair = before - self._under(edit, "direct", half.images, texts), pairs[one.group]
            of_pair = half.only(np.isin(half.labels, pair))
            some = of_pair.only(some_of_each(of_pair.cells))
            images = self.track(some.images, f"what writes along the direction of {half.group_names[one.group]}")
            written = some, contributions_along(self.sources, self.pictures, images, one.vector)
            rows.append(direction_shown(self.engine.bundle, one, half, pair, taken, written, self.question.seed))
        return rows

    def _logits(self, embeddings: Array, texts: Texts) -> Array:
        """[n, N]"""
        logits: Array = self.engine.bundle.manifest.logit_scale * (embeddings @ texts.labels.T)
        return logits

    def _under(self, interventions: Sequence[Intervention], mode: Mode, images: Sequence[str], texts: Texts) -> Array:
        """Logits [n, N] under an edit."""
        return self._logits(edited(self.runner, self.pictures, images, interventions, mode, self.batch), texts)

    def _compare(
        self,
        half: Examples,
        others: Examples,
        embeddings: Array,
        texts: Texts,
        sought: Search,
        found: Found,
        given: Given,
    ) -> tuple[list[Method], list[str]]:
        """(each method on the held-out half, what could not be compared). embeddings: of its images."""
        question, before = self.question, self._logits(embeddings, texts)
        comparison = Comparison(Judge(others, question.seed), before.argmax(-1))
        methods, left_out = [comparison.zero_shot()], list[str]()

        def run(candidate: Candidate, found: Found = found) -> NDArray[np.integer]:
            after = self._under(candidate.interventions(found), candidate.mode, others.images, texts)
            return conditioned(before, after, candidate.condition).argmax(-1)

        if sought.best is not None:
            chosen = sought.best.candidate
            methods.append(comparison.method("the edit", chosen.title, run(chosen)))
            plain = Candidate("ablate", chosen.count, chosen.mode)
            if not chosen.of_features:
                plain = Candidate("ablate", min(question.shown, len(found.features)), self.runner.modes[-1])
                generator = np.random.default_rng(question.seed)
                of_draws = [drawn(found.directions, found.middle, generator) for _ in range(question.draws)]
                results = [run(chosen, replace(found, directions=one)) for one in of_draws]
                methods += comparison.random("random directions", results)
                if of_features := [trial for trial in sought.trials if trial.candidate.of_features]:
                    best = max(of_features, key=lambda trial: (trial.worst, trial.average)).candidate
                    methods.append(comparison.method("features alone", best.title, run(best)))
            if plain.count and plain != chosen:
                methods.append(comparison.method("zero-ablation", plain.title, run(plain)))
            if plain.count:
                done = chosen if chosen.of_features else plain
                results = [run(done, one) for one in self._drawn(half, done.count, found, given)]
                methods += comparison.random("random features", results)
        if question.cue:
            methods += comparison.projections(embeddings, texts, question)
        else:
            left_out.append(NO_CUE)
        return methods, left_out

    def _drawn(self, half: Examples, count: int, found: Found, given: Given) -> list[Found]:
        """For each draw as many other features that are active in the finding half, and where they fire."""
        active = {key for _, of_images in given.values() for keys in of_images.keys for key in keys.tolist()}
        taken = set(found.features[:count])
        pool = [feature for feature in map(self._feature, sorted(active)) if feature not in taken]
        generator, count = np.random.default_rng(self.question.seed), min(count, len(pool))
        draws = [generator.choice(len(pool), count, replace=False).tolist() for _ in range(self.question.draws)]
        places = sorted(set().union(*draws))
        firings = dict(zip(places, self._firings(half, [pool[place] for place in places]), strict=True))
        return [
            replace(found, features=[pool[one] for one in draw], firings=[firings[one] for one in draw])
            for draw in draws
        ]
