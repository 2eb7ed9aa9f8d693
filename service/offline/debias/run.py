"""All of it, one after the other: groups, ranking, search, and the held-out half."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vitrine.models.account.ledger import Array
from vitrine.models.bundle.bundle import Bundle
from vitrine.models.interventions.spec import Intervention, Mode
from vitrine.service.engine.engine import Engine
from vitrine.service.offline.debias.accuracy import Judge
from vitrine.service.offline.debias.candidates import Candidate, Feature
from vitrine.service.offline.debias.comparison import Comparison, predicted
from vitrine.service.offline.debias.contributions import Contributions, contributions
from vitrine.service.offline.debias.cue import in_words
from vitrine.service.offline.debias.errors import DebiasError
from vitrine.service.offline.debias.examples import Examples, check_halves
from vitrine.service.offline.debias.firing import Firing, firing
from vitrine.service.offline.debias.pictures import Pictures
from vitrine.service.offline.debias.question import Encoder, Question, Texts, encode
from vitrine.service.offline.debias.ranking import Contrast, Place, contrasts, effects, rank
from vitrine.service.offline.debias.report import Method, Report, TrialRow
from vitrine.service.offline.debias.runner import Runner, edited
from vitrine.service.offline.debias.search import COUNTS, Search, search
from vitrine.service.offline.debias.shown import shown
from vitrine.service.offline.debias.unlabelled import by_errors

Track = Callable[[Sequence[Any], str], Iterable[Any]]
# of each pair of labels the finding half's images that are of it, and their contributions
Given = dict[tuple[int, int], tuple[NDArray[np.int64], Contributions]]
WITH_CUE = ("without the cue", "with the cue")
NO_CUE = "Orth-Proj and Orth-Cali need the cue in words: --cue"


def check_features(bundle: Bundle) -> None:
    """Raise `DebiasError` for a bundle without a CLT."""
    if not bundle.manifest.has_features:
        raise DebiasError(f"debiasing edits features: {bundle.manifest.why_no_features}")


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
                f"{engine.bundle.path} has no source accounts, by which features are ranked: export it with "
                "`bundle.sources`, and leave VITRINE_SOURCES as it is"
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
        embeddings = self._plain(examples.images)
        before = predicted(embeddings, texts.labels)
        examples, kept = self._grouped(examples, embeddings, texts)
        embeddings, before = embeddings[kept], before[kept]
        finding, held_out = np.flatnonzero(examples.finding), np.flatnonzero(~examples.finding)
        half = examples.only(finding)
        if (before[finding] == half.labels).all():
            raise DebiasError(f"all {len(half):,} images of the finding half are right: there is nothing to repair")
        compared = contrasts(half, embeddings[finding] @ texts.labels.T)
        given = {contrast.pair: self._given(half, contrast.pair, texts) for contrast in compared}
        ranking = self._rank(half, compared, given)
        features = [self._feature(place.key) for place in ranking]
        firings = self._firings(half, features)
        found = self._search(half, before[finding], texts, features, firings)
        chosen = found.best.candidate if found.best else None
        others = held_out, embeddings[held_out], before[held_out]
        methods, left_out = self._compare(examples, others, texts, chosen, features, firings, given)
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
            interventions=list(chosen.interventions(features, firings)) if chosen else [],
            mode=chosen.mode if chosen else None,
            proposed=chosen.title if chosen else None,
            trials=[TrialRow.of(trial) for trial in found.trials],
            refused=found.refused,
            methods=methods,
            left_out=left_out,
            seconds=perf_counter() - start,
        )

    def _plain(self, images: Sequence[str]) -> Array:
        """Unit embeddings [n, D]."""
        rows = []
        for batch in self.track([images[at : at + self.batch] for at in range(0, len(images), self.batch)], "predict"):
            pixels = np.stack([self.pictures.pixels(image) for image in batch])
            rows += [parts.embedding for parts in self.engine.explain(pixels)]
        return np.stack(rows)

    def _grouped(self, examples: Examples, embeddings: Array, texts: Texts) -> tuple[Examples, NDArray[np.int64]]:
        """(images in groups, which these are). Raises `DebiasError` where there are none to compare."""
        if self.question.by == "cue":
            has_cue = in_words(embeddings, examples.labels, texts.cue, texts.others)
            return examples.with_groups(has_cue.astype(np.int64), WITH_CUE), np.arange(len(examples))
        if self.question.by == "errors":
            return self._by_errors(examples, embeddings @ texts.labels.T, texts)
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
            raise DebiasError("no image of the finding half is mistaken: there is nothing to repair")
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

    def _firings(self, half: Examples, features: Sequence[Feature]) -> list[Firing]:
        if not features:
            return []
        images = self.track(half.images, "where features fire")
        return firing(self.sources, self.pictures, images, half.cells, [(one.layer, one.index) for one in features])

    def _search(
        self,
        half: Examples,
        before: NDArray[np.integer],
        texts: Texts,
        features: Sequence[Feature],
        firings: Sequence[Firing],
    ) -> Search:
        def predict(candidate: Candidate) -> NDArray[np.integer]:
            return self._under(candidate.interventions(features, firings), candidate.mode, half.images, texts)

        def track(candidates: Sequence[Candidate]) -> Iterable[Candidate]:
            return self.track(candidates, "edits")

        modes = self.runner.modes if features else ()
        return search(predict, before, half.labels, half.cells, modes, len(features), self.question.cap, track)

    def _under(
        self, interventions: Sequence[Intervention], mode: Mode, images: Sequence[str], texts: Texts
    ) -> NDArray[np.integer]:
        """[n] predicted labels under an edit."""
        embeddings = edited(self.runner, self.pictures, images, interventions, mode, self.batch)
        return predicted(embeddings, texts.labels)

    def _compare(
        self,
        examples: Examples,
        held_out: tuple[NDArray[np.int64], Array, NDArray[np.integer]],
        texts: Texts,
        chosen: Candidate | None,
        features: Sequence[Feature],
        firings: Sequence[Firing],
        given: Given,
    ) -> tuple[list[Method], list[str]]:
        """(each method on the held-out half, what could not be compared). held_out: numbers of its images, their
        embeddings, and what is predicted of them."""
        numbers, embeddings, before = held_out
        others, question = examples.only(numbers), self.question
        comparison = Comparison(Judge(others, question.seed), before)
        methods, left_out = [comparison.zero_shot()], list[str]()
        if chosen is not None:
            mode = chosen.mode

            def run(interventions: Sequence[Intervention]) -> NDArray[np.integer]:
                return self._under(interventions, mode, others.images, texts)

            methods += comparison.edits(run, chosen, features, firings)
            drawn = self._drawn(examples.only(examples.finding), features[: chosen.count], given)
            methods += comparison.random(run, chosen, drawn)
        if question.cue:
            methods += comparison.projections(embeddings, texts, question)
        else:
            left_out.append(NO_CUE)
        return methods, left_out

    def _drawn(
        self, half: Examples, taken: Sequence[Feature], given: Given
    ) -> list[tuple[Sequence[Feature], Sequence[Firing]]]:
        """For each draw as many other features that are active in the finding half, and where they fire."""
        active = {key for _, of_images in given.values() for keys in of_images.keys for key in keys.tolist()}
        pool = [feature for feature in map(self._feature, sorted(active)) if feature not in set(taken)]
        generator, count = np.random.default_rng(self.question.seed), min(len(taken), len(pool))
        draws = [generator.choice(len(pool), count, replace=False).tolist() for _ in range(self.question.draws)]
        drawn = sorted(set().union(*draws))
        firings = dict(zip(drawn, self._firings(half, [pool[place] for place in drawn]), strict=True))
        return [([pool[place] for place in draw], [firings[place] for place in draw]) for draw in draws]
