"""Seeds and mutations of `fuzz_inputs.py`: small valid files of every kind, and what damage and malice make of them.

A mutation is a function of (seed, kind, number), so that any input can be made again.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import duckdb

from corpus import drawn_images
from vitrine.training.recipes.catalogue import shipped

Chance = random.Random
LISTED = ["a.jpg", "b.png", "deep/c.webp", "missing.png"]  # files that lists and tables name
ODD_BYTES = (0, 1, 0x7F, 0x80, 0xFE, 0xFF)
ODD_NUMBERS = (0, 1, -1, 127, 128, 255, 2**31 - 1, 2**31, -(2**31), 2**32 - 1, 2**63 - 1, -(2**63), 2**64 - 1)
ODD_SIZES: tuple[bytes, ...] = (b"77777777777\0", b"00000000000\0", b"-0000000001\0", b"00000001000\0", b" " * 12)
ODD_SIZES += (b"\x80" + b"\xff" * 11, b"\xff" * 12, b"\x80" + bytes(3) + b"\x7f" + b"\xff" * 7)  # in binary
ODD_SIZES += (b"0o1234567890", "١٢".encode() + bytes(8))
TYPES = b"\x000123456789xgLKSNDMVAXz"
DEEP = "[" * 20_000
PLACEHOLDER = "<deep>"
zipped = partial(gzip.compress, mtime=0)  # the same whenever it is made


def seeds() -> dict[str, list[bytes]]:
    """kind -> valid files."""
    images = [*drawn_images(5, side=24), b"no image"]
    return {
        "parquet": list(_tables(images)),
        "huggingface": list(_data_sets(images[:-1])),
        "tar": list(_tars(images)),
        "list": ["\n".join(LISTED).encode(), ("\ufeff" + "\r\n".join(f"./{name}" for name in LISTED)).encode()],
        "labels": [
            b'{"labels": ["cat", "dog", "gr\xc3\xbcn"], "templates": ["a photo of a {}", "{}"]}',
            json.dumps({"labels": [f"label {number}" for number in range(200)]}).encode(),
        ],
        "job": [],  # by the program, which knows the bundle
        "manifest": [],
        "checkpoint": [],
        "recipe": [path.read_bytes() for path in shipped()],
    }


def _tables(images: list[bytes]) -> Iterator[bytes]:
    """Parquet by DuckDB and by pyarrow: bytes, paths, both; codecs, row groups, pages, other columns beside them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    both = [{"bytes": image, "path": None} for image in images] + [{"bytes": None, "path": name} for name in LISTED]
    columns: list[dict[str, Any]] = [
        {"image": images, "label": list(range(len(images)))},
        {"image": LISTED * 4},
        {"image": both},
        {"image": images, "tags": [["a", "b"], None, []] * 2, "when": [None] * 6, "x": [0.5] * 6},
    ]
    options: list[dict[str, Any]] = [
        {"compression": codec, "row_group_size": rows, "data_page_version": page, "use_dictionary": dictionary}
        for codec, rows, page, dictionary in (
            ("none", 3, "1.0", False),
            ("snappy", 100, "2.0", True),
            ("zstd", 2, "1.0", True),
            ("gzip", 5, "2.0", False),
            ("brotli", 100, "1.0", False),
            ("lz4", 4, "1.0", True),
        )
    ]
    for table in columns:
        for choice in options:
            buffer = io.BytesIO()
            pq.write_table(pa.table(table), buffer, data_page_size=512, write_page_index=True, **choice)
            yield buffer.getvalue()
    with tempfile.TemporaryDirectory() as folder, duckdb.connect() as database:
        database.execute("CREATE TABLE photos (number INTEGER, image BLOB)")
        database.executemany("INSERT INTO photos VALUES (?, ?)", list(enumerate(images)))
        for codec in ("snappy", "zstd", "uncompressed"):
            database.table("photos").write_parquet(f"{folder}/x.parquet", compression=codec)
            yield Path(f"{folder}/x.parquet").read_bytes()


def _data_sets(images: list[bytes]) -> Iterator[bytes]:
    """Parquet with images and classes as `datasets` writes it."""
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    rows = {"image": [{"bytes": image, "path": None} for image in images], "label": [0, 1, 2, 1, 0]}
    for rows_per_group in (2, 100):
        buffer = io.BytesIO()
        datasets.Dataset.from_dict(rows, features=features).to_parquet(buffer, batch_size=rows_per_group)
        yield buffer.getvalue()


def _tars(images: list[bytes]) -> Iterator[bytes]:
    """Tars of three dialects: samples with classes and texts, links, long names, litter, two in one; compressed."""
    endings = ("jpg", "png", "webp", "gif", "bmp")
    plain = []
    for dialect in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=dialect) as tar:
            for number, image in enumerate(images[:6]):
                long = "n" * 80 + "/" + "m" * (200 if dialect != tarfile.USTAR_FORMAT else 10)
                stem = f"{long}/{number}" if number == 2 else f"{number:03}.input" if number == 3 else f"{number:03}"
                _add(tar, f"{stem}.{endings[number % 5]}", image)
                _add(tar, f"{stem}.cls" if number != 4 else f"{stem}.txt", str(number).encode())
            _add(tar, "._000.jpg", b"litter")
            _add(tar, "film.mp4", b"other")
            for name, kind, target in (
                ("hard.jpg", tarfile.LNKTYPE, "000.jpg"),
                ("soft.png", tarfile.SYMTYPE, "./001.png"),
                ("round.png", tarfile.SYMTYPE, "round.png"),
                ("out.png", tarfile.SYMTYPE, "../../etc/passwd"),
            ):
                link = tarfile.TarInfo(name)
                link.type, link.linkname = kind, target
                tar.addfile(link)
        plain.append(buffer.getvalue())
    sparse = bytearray(plain[1])
    sparse[156:157] = b"S"  # its map is whatever stands there
    yield from plain
    yield plain[0] + plain[2]
    yield plain[1].rstrip(b"\0")
    yield reseal(bytes(sparse))
    for compress in (zipped, bz2.compress, lzma.compress):
        yield compress(plain[0])
    yield zipped(plain[1]) + zipped(plain[2])


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def reseal(data: bytes) -> bytes:
    """A tar with right checksums again, so that what a header says is believed."""
    tar = bytearray(data)
    for at in range(0, len(tar) - 511, 512):
        if tar[at + 257 : at + 262] == b"ustar":
            tar[at + 148 : at + 156] = b" " * 8
            tar[at + 148 : at + 156] = b"%06o\0 " % sum(tar[at : at + 512])
    return bytes(tar)


def mutate(kind: str, files: list[bytes], chance: Chance) -> bytes:
    """One damaged file of a kind."""
    data = chance.choice(files)
    special: dict[str, Callable[[bytes, Chance], bytes]] = {"parquet": _parquet, "huggingface": _parquet, "tar": _tar}
    for name in ("labels", "job", "manifest", "checkpoint"):
        special[name] = _json
    special["recipe"] = _toml
    by_structure = kind in special and chance.random() < 0.7
    if by_structure:
        data = special[kind](data, chance)
    if not by_structure or chance.random() < 0.3:
        data = _bytes(data, files, chance)
    return data


def _bytes(data: bytes, files: list[bytes], chance: Chance) -> bytes:
    """Bytes changed, cut out, doubled, taken from another file; or the end cut off."""
    mutated = bytearray(data or b"\0")
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        at, length = chance.randrange(len(mutated)), chance.choice((1, 2, 4, 64, 512))
        match chance.randrange(7):
            case 0:
                mutated[at] ^= 1 << chance.randrange(8)
            case 1:
                mutated[at] = chance.choice(ODD_BYTES)
            case 2:
                del mutated[at : at + length]
            case 3:
                mutated[at:at] = mutated[at : at + length]
            case 4:
                other = chance.choice(files)
                mutated[at : at + length] = other[at : at + length]
            case 5:
                size = chance.choice((1, 2, 4, 8))
                number = chance.choice(ODD_NUMBERS) % 2 ** (8 * size)
                mutated[at : at + size] = number.to_bytes(size, chance.choice(("little", "big")))
            case 6 if chance.random() < 0.3:
                del mutated[at:]
        mutated = mutated or bytearray(b"\0")
    return bytes(mutated)


def _parquet(data: bytes, chance: Chance) -> bytes:
    """What describes the rest: the footer, mostly, its length, and the headers of pages."""
    mutated = bytearray(data)
    length = int.from_bytes(mutated[-8:-4], "little")
    start = max(4, len(mutated) - 8 - length)
    if chance.random() < 0.1:
        mutated[-8:-4] = (chance.choice(ODD_NUMBERS) % 2**32).to_bytes(4, "little")
    for _ in range(chance.choice((1, 1, 2, 3, 8))):
        at = chance.randrange(start, len(mutated) - 8) if chance.random() < 0.7 else chance.randrange(4, start)
        match chance.randrange(4):
            case 0:
                mutated[at] = chance.randrange(256)
            case 1:  # numbers are varints there: one more, one less, another sign
                mutated[at] = (mutated[at] + chance.choice((-2, -1, 1, 2, 16))) % 256
            case 2:
                mutated[at : at + 5] = b"\xff\xff\xff\xff\x0f"
            case 3:
                mutated[at : at + 10] = b"\xff" * 9 + b"\x01"
    return bytes(mutated)


def _tar(data: bytes, chance: Chance) -> bytes:
    """Fields of headers, mostly with a right checksum. What is compressed is decompressed, and compressed again."""
    for start, expand, compress in (
        (b"\x1f\x8b", gzip.decompress, zipped),
        (b"BZh", bz2.decompress, bz2.compress),
        (b"\xfd7z", lzma.decompress, lzma.compress),
    ):
        if data.startswith(start):
            return compress(_tar(expand(data), chance))
    mutated = bytearray(data)
    headers = [at for at in range(0, len(mutated) - 511, 512) if mutated[at + 257 : at + 262] == b"ustar"]
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.choice(headers)
        match chance.randrange(7):
            case 0 | 1:
                mutated[at + 124 : at + 136] = chance.choice(ODD_SIZES)[:12].ljust(12, b"\0")
            case 2:
                mutated[at + 156] = chance.choice(TYPES)
            case 3:
                name = chance.choice((b"", b"/", b"../../x.jpg", b"\xff\xfe.jpg", b"a" * 100, b".", b"a/../b.png"))
                field = chance.choice((0, 157, 345))
                mutated[at + field : at + field + 100] = name.ljust(100, b"\0")
            case 4:
                mutated[at + 257 : at + 265] = chance.choice((b"ustar  \0", b"ustar\00000", b"ustar\x00xx"))
            case 5:  # the content of an extended header, or of an image
                place = min(len(mutated) - 1, at + 512 + chance.randrange(64))
                mutated[place] = chance.choice(b"0123456789 =\n\0\xff")
            case 6:
                other = chance.choice(headers)
                mutated[at : at + 512] = mutated[other : other + 512]
    return reseal(bytes(mutated)) if chance.random() < 0.8 else bytes(mutated)


def _odd(chance: Chance) -> Any:
    """A value that somebody might write there."""
    values: list[Any] = [None, True, -1, 0, 1.5, 2**63, 10**400, 1e308, float("nan"), float("inf")]
    values += ["", "\ud800", "a\0b", [], {}]
    return chance.choice((*values, "ß" * 5_000, ["x"] * 300, {"": {}}, [[[]]], "{}", "../../x", PLACEHOLDER))


def _json(data: bytes, chance: Chance) -> bytes:
    """Values replaced, left out, doubled; keys that are unknown; nesting without end."""
    value = json.loads(data)
    for _ in range(chance.choice((1, 1, 2, 3))):
        parent = value
        while True:
            keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
            if not keys:
                break
            key = chance.choice(keys)
            if isinstance(parent[key], dict | list) and parent[key] and chance.random() < 0.8:
                parent = parent[key]
                continue
            match chance.randrange(4):
                case 0 | 1:
                    parent[key] = _odd(chance)
                case 2:
                    del parent[key]
                case 3 if isinstance(parent, dict):
                    parent[chance.choice(("x", "", "__class__", str(key).upper()))] = _odd(chance)
                case 3:
                    parent.append(parent[key])
            break
    text = json.dumps(value, ensure_ascii=chance.random() < 0.5)
    return text.replace(json.dumps(PLACEHOLDER), DEEP).encode(errors="surrogatepass")


def _toml(data: bytes, chance: Chance) -> bytes:
    """Lines left out, doubled, with another value."""
    lines = data.decode().splitlines()
    for _ in range(chance.choice((1, 1, 2, 4))):
        at = chance.randrange(len(lines))
        match chance.randrange(4):
            case 0:
                del lines[at]
            case 1:
                lines.insert(at, chance.choice(lines))
            case 2:
                key = lines[at].partition("=")[0]
                odd = ('""', "-1", "0", "1e999", "nan", "[]", "{}", "true", "9" * 400, "2026-01-01", DEEP, '"\\u0000"')
                lines[at] = f"{key.strip() or 'x'} = {chance.choice(odd)}"
            case 3:
                lines[at] = chance.choice(("[x]", "[[data]]", "[data.train]", "= 1", "a" * 5_000, "x = {" * 3_000))
        lines = lines or [""]
    return "\n".join(lines).encode()
