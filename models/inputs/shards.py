"""The images in tars as a source: by their places, or in one pass where a tar is compressed."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from vitrine.models.files.names import display, printable
from vitrine.models.inputs.errors import InputError
from vitrine.models.inputs.files import LARGEST, common_names, too_large
from vitrine.models.inputs.places import Place, list_images, read_at
from vitrine.models.inputs.skipped import Reason, Skipped
from vitrine.models.inputs.source import Item, digest, failing
from vitrine.models.inputs.streams import ShardError, Stream, open_stream


class Shards:
    """The images in tar files, by an index of their members."""

    kind = "shards"

    def __init__(self, paths: list[Path], skipped: Skipped, skip_broken: bool = False) -> None:
        """Raises `InputError` for a tar that is damaged or missing, unless these are to be skipped."""
        self.paths, self.skipped, self.skip_broken = paths, skipped, skip_broken
        self.titles = common_names(paths)
        self.places: list[list[Place]] = []
        self.compressed: list[bool] = []
        for path, title in zip(paths, self.titles, strict=True):
            try:
                places, compressed = list_images(path, title, skipped)
            except ShardError as error:
                if not skip_broken:
                    raise broken(path, error) from error
                skipped.add(Reason.BROKEN, title, str(error))
                places, compressed = [], False
            self.places.append(places)
            self.compressed.append(compressed)
        self.starts = [0, *itertools.accumulate(map(len, self.places))]

    def __len__(self) -> int:
        return self.starts[-1]

    def digest(self) -> str:
        """SHA-256 of names, places and sizes."""
        places = (
            f"{title}\0{place.name}\0{place.offset} {place.size}"
            for title, found in zip(self.titles, self.places, strict=True)
            for place in found
        )
        return digest(itertools.chain(self.titles, places))

    def reader(self) -> ShardReader:
        return ShardReader(self)


class ShardReader:
    """Reads a source's tars; of a compressed one the stream stays open, and goes forward."""

    def __init__(self, source: Shards) -> None:
        self._source = source
        self._shard = -1
        self._stream: Stream | None = None
        self._last: tuple[int, bytes] = (-1, b"")  # offset and bytes of the last member, to which links may lead
        self._failed: dict[int, str] = {}  # shards that proved to be damaged

    def items(self, start: int, stop: int) -> Iterator[Item]:
        source = self._source
        for number in range(start, min(stop, len(source))):
            shard = bisect_right(source.starts, number) - 1
            place = source.places[shard][number - source.starts[shard]]
            path = source.paths[shard]
            read: Callable[[], bytes]
            if place.size > LARGEST:
                read = failing(str(too_large(place.size).strerror))
            elif source.compressed[shard]:
                read = self._next(shard, place)
            else:
                read = partial(read_at, path, place.offset, place.size)
            yield Item(number, f"{display(source.titles[shard])}/{display(place.name)}", read)

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._shard, self._stream, self._last = -1, None, (-1, b"")

    def _next(self, shard: int, place: Place) -> Callable[[], bytes]:
        """Read a member of a compressed tar."""
        if shard in self._failed:
            return failing(self._failed[shard])
        try:
            if shard != self._shard or (place.offset != self._last[0] and self._position > place.offset):
                self.close()
                self._shard, self._stream = shard, open_stream(self._source.paths[shard])
            if place.offset != self._last[0]:
                assert self._stream is not None
                self._stream.forward(place.offset)
                content = self._stream.read(place.size)
                if len(content) < place.size:
                    raise ShardError("it is shorter than when it was listed")
                self._last = (place.offset, content)
        except ShardError as error:
            self.close()
            if not self._source.skip_broken:
                raise broken(self._source.paths[shard], error) from error
            self._failed[shard] = f"its tar cannot be read: {error}"
            return failing(self._failed[shard])
        return partial(bytes, self._last[1])

    @property
    def _position(self) -> int:
        return 0 if self._stream is None else self._stream.position


def broken(shard: Path, error: ShardError) -> InputError:
    """The one sentence about a tar that cannot be read."""
    return InputError(
        f"{printable(shard)} is not a readable tar file: {error}. {error.remedy}, or skip it with --skip-broken-shards"
    )
