"""A loaded bundle, ready to answer from Python."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from vitrine.models.bundle.bundle import Bundle
from vitrine.models.bundle.layout import Dictionary
from vitrine.models.errors import VitrineError
from vitrine.service.answers.attribute import answer_attribute
from vitrine.service.answers.attributor import Attributor
from vitrine.service.answers.circuit import answer_circuit
from vitrine.service.answers.classify import answer_classify
from vitrine.service.answers.embed import embed
from vitrine.service.answers.features import card
from vitrine.service.answers.intervene import answer_intervene
from vitrine.service.answers.notices import to_notices
from vitrine.service.errors import ServiceError
from vitrine.service.exports.account import page_for
from vitrine.service.exports.page import draw_page
from vitrine.service.library import images as given_images
from vitrine.service.library.account import Account
from vitrine.service.library.images import Given, ImageLike
from vitrine.service.library.options import (
    CircuitOptions,
    ClassifyOptions,
    ExplainOptions,
    InterveneOptions,
    flat_names,
    request_of,
)
from vitrine.service.library.runner import Runner
from vitrine.service.operations.settings import Settings
from vitrine.service.schemas.attribute import AttributeRequest, AttributeResponse
from vitrine.service.schemas.base import AnswerShape
from vitrine.service.schemas.circuit import CircuitRequest, CircuitResponse
from vitrine.service.schemas.classify import ClassifyRequest, ClassifyResponse
from vitrine.service.schemas.embed import EmbedRequest
from vitrine.service.schemas.features import CardResponse
from vitrine.service.schemas.intervene import InterveneRequest, InterveneResponse

Answer = TypeVar("Answer")
Response = TypeVar("Response", bound=AnswerShape)

IDENTITY = "python"  # in the place of a request's


class Explainer:
    """A bundle that explains how its CLIP classifies images. `vitrine.load` opens one.

    Several threads may use it at once. It works inside a running event loop (such as Jupyter's), because it does its
    work in its own threads and processes. They end with `close`, at the end of a `with` block, or when nothing refers
    to it or to its accounts any more. A process that is forked after loading cannot use it; load the bundle there.

    An image is a path, the bytes of an image file, a PIL image, or a numpy array [H, W, 3] of uint8; files are read as
    the service reads them. Anything else is refused (`images.NoImageError`), also URLs: nothing is fetched. A list of
    images returns a list of answers, made in batches, and the first image that cannot be answered raises its error. To
    skip such images, send them one at a time, or use `vitrine bulk`.

    Options have the names of the fields in the service's requests (service/README.md), including those of `explain`:
    `explain(image, labels=["cat", "dog"], contrast="dog", heatmap=True)`. A call that cannot be answered raises
    `vitrine.VitrineError`; its message says what is wrong and what to do.
    """

    def __init__(self, bundle: Bundle, settings: Settings) -> None:
        """Load the bundle, which takes a second or more. Raises `BundleError`, `EngineError`, `LabelSetError`,
        `EditError`."""
        self.bundle, self.settings = bundle, settings
        self._runner = Runner(bundle, settings)
        self._at_once = settings.capacity  # images in hand, of all threads
        self._places = asyncio.Semaphore(self._at_once)
        weakref.finalize(self, self._runner.begin_to_close).atexit = False

    def __enter__(self) -> Explainer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._runner.is_closed else f"{self.bundle.manifest.shape.layers} layers"
        return f"<vitrine.Explainer {self.bundle.manifest.name} {self.bundle.digest[:19]}…, {state}>"

    def close(self) -> None:
        """End its threads and processes after all current calls are answered. Accounts that it returned stay usable."""
        self._runner.close()

    @property
    def is_closed(self) -> bool:
        """Whether it has been closed; then it answers no more calls."""
        return self._runner.is_closed

    @property
    def labels(self) -> list[str]:
        """The bundle's own labels, which are used if a call gives no others."""
        return list(self.bundle.manifest.text.labels)

    @overload
    def explain(self, images: ImageLike, **options: Unpack[ExplainOptions]) -> Account: ...  # type: ignore[overload-overlap]
    @overload
    def explain(self, images: Iterable[ImageLike], **options: Unpack[ExplainOptions]) -> list[Account]: ...
    def explain(
        self, images: ImageLike | Iterable[ImageLike], **options: Unpack[ExplainOptions]
    ) -> Account | list[Account]:
        """The prediction for an image and its account, as `POST /v1/attribute` answers; for several images, a list.

        Raises `VitrineError`, `OSError` for a file that cannot be read.
        """
        request = request_of(AttributeRequest, options)

        async def one(attributor: Attributor, image: Given) -> Account:
            answer = await answer_attribute(attributor, image.content, request, IDENTITY)
            answer = _noted(answer, image)
            return Account(answer, partial(self._page, answer, image.content, request))

        return self._ask(images, one)

    @overload
    def classify(self, images: ImageLike, **options: Unpack[ClassifyOptions]) -> ClassifyResponse: ...  # type: ignore[overload-overlap]
    @overload
    def classify(self, images: Iterable[ImageLike], **options: Unpack[ClassifyOptions]) -> list[ClassifyResponse]: ...
    def classify(
        self, images: ImageLike | Iterable[ImageLike], **options: Unpack[ClassifyOptions]
    ) -> ClassifyResponse | list[ClassifyResponse]:
        """Only the prediction, as `POST /v1/classify` answers; or a list of them. Raises what `explain` raises."""
        request = request_of(ClassifyRequest, options)

        async def one(attributor: Attributor, image: Given) -> ClassifyResponse:
            return _noted(await answer_classify(attributor, image.content, request, IDENTITY), image)

        return self._ask(images, one)

    def embed(
        self,
        images: ImageLike | Iterable[ImageLike] | None = None,
        *,
        texts: Sequence[str] | None = None,
        edit: str | None = None,
        strict: bool = False,
    ) -> NDArray[np.float32]:
        """CLIP's embeddings, of length 1: [D] for one image, [N, D] for several, or [N, D] for `texts`.

        Texts are embedded without templates. edit, strict: as in `POST /v1/embed`. Raises what `explain` raises, and if
        both or neither of `images` and `texts` are given.
        """
        if (images is None) == (texts is None):
            raise ServiceError("invalid_request", "`images` and `texts` need separate calls; give one of them")
        if isinstance(texts, str):
            raise ServiceError("invalid_request", "`texts` must be a list; give [text]")
        request = request_of(EmbedRequest, {"texts": texts, "edit": edit, "strict": strict})
        if images is None:
            found = self._runner.call(lambda attributor: embed(attributor, [], request))
            assert found.texts is not None
            return found.texts

        async def one(attributor: Attributor, image: Given) -> NDArray[np.float32]:
            (embedding,) = (await embed(attributor, [image.content], request)).images
            return np.asarray(embedding, np.float32)

        made = self._ask(images, one)
        if isinstance(made, list):
            return np.array(made, np.float32).reshape(-1, self.bundle.manifest.shape.embedding)
        return made

    def card(self, layer: int, index: int, *, dictionary: Dictionary = "clt") -> CardResponse:
        """The card of a feature, as `GET /v1/features/{layer}/{index}` answers. Raises `VitrineError`."""

        async def ask(attributor: Attributor) -> CardResponse:
            return await attributor.query(card, self.bundle, attributor.model, dictionary, layer, index)

        return self._runner.call(ask)

    @overload
    def intervene(self, images: ImageLike, **options: Unpack[InterveneOptions]) -> InterveneResponse: ...  # type: ignore[overload-overlap]
    @overload
    def intervene(
        self, images: Iterable[ImageLike], **options: Unpack[InterveneOptions]
    ) -> list[InterveneResponse]: ...
    def intervene(
        self, images: ImageLike | Iterable[ImageLike], **options: Unpack[InterveneOptions]
    ) -> InterveneResponse | list[InterveneResponse]:
        """The prediction and its account before and after changes, as `POST /v1/intervene` answers; or a list of them.

        `edits=["ablate 7/123"]`, written as for `vitrine intervene` or as dicts; or `counterfactual="dog"`. Raises what
        `explain` raises.
        """
        request = request_of(InterveneRequest, options)

        async def one(attributor: Attributor, image: Given) -> InterveneResponse:
            return _noted(await answer_intervene(attributor, image.content, request, IDENTITY), image)

        return self._ask(images, one)

    @overload
    def circuit(self, images: ImageLike, **options: Unpack[CircuitOptions]) -> CircuitResponse: ...  # type: ignore[overload-overlap]
    @overload
    def circuit(self, images: Iterable[ImageLike], **options: Unpack[CircuitOptions]) -> list[CircuitResponse]: ...
    def circuit(
        self, images: ImageLike | Iterable[ImageLike], **options: Unpack[CircuitOptions]
    ) -> CircuitResponse | list[CircuitResponse]:
        """Which features produced the features that produced a logit, as `POST /v1/circuit` answers; or a list of them.

        A circuit takes seconds; several are made one after another. Raises what `explain` raises.
        """
        request = request_of(CircuitRequest, options)

        async def one(attributor: Attributor, image: Given) -> CircuitResponse:
            return _noted(await answer_circuit(attributor, image.content, request, IDENTITY), image)

        return self._ask(images, one)

    def _page(self, answer: AttributeResponse, image: bytes, request: AttributeRequest) -> str:
        """The page of `vitrine attribute --html`: with heat map, sources and cards, whether they were asked for or not,
        while the bundle is open. Raises `VitrineError`."""
        if self._runner.is_closed:
            return draw_page(answer, image, {}, self.bundle.manifest.preprocessing)
        return self._runner.call(lambda attributor: page_for(attributor, image, request))

    def _ask(
        self, images: ImageLike | Iterable[ImageLike], one: Callable[[Attributor, Given], Awaitable[Answer]]
    ) -> Answer | list[Answer]:
        """one(attributor, image) of one image, or of each of several."""
        if given_images.is_one(images):
            image = given_images.read(images)

            async def ask(attributor: Attributor) -> Answer:
                async with self._places:
                    return await one(attributor, image)

            with flat_names():
                return self._runner.call(ask)
        assert isinstance(images, Iterable)
        several = list(images)  # what is listed, not what is in the files
        with flat_names():
            return self._runner.call(lambda attributor: self._each(attributor, several, one))

    async def _each(
        self, attributor: Attributor, images: Sequence[Any], one: Callable[[Attributor, Given], Awaitable[Answer]]
    ) -> list[Answer]:
        """All in hand at once for which there is a place, so that batches are full."""
        failed = asyncio.Event()

        async def ask(place: int) -> Answer | VitrineError | OSError | None:
            async with self._places:
                if failed.is_set():
                    return None
                try:
                    return await one(attributor, await asyncio.to_thread(given_images.read, images[place]))
                except (VitrineError, OSError) as error:
                    failed.set()
                    return _placed(error, place)

        with attributor.taking_turns():
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(ask(place)) for place in range(len(images))]
        answers: list[Answer] = []
        for task in tasks:
            if isinstance(found := task.result(), VitrineError | OSError):
                raise found
            if found is not None:
                answers.append(found)
        return answers


def _placed(error: VitrineError | OSError, place: int) -> VitrineError | OSError:
    """The error, which says of which image it is."""
    if isinstance(error, ServiceError):
        return ServiceError(error.code, f"image {place}: {error.message}", error.details, error.headers)
    error.add_note(f"This is the image at index {place} of the list.")
    return error


def _noted(answer: Response, image: Given) -> Response:
    """The answer, which also says what was done to the picture before it became an image file."""
    if not image.notes:
        return answer
    return answer.model_copy(update={"warnings": [*answer.warnings, *to_notices(image=image.notes)]})
