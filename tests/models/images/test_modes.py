"""Every mode, depth, format and orientation against arrays that are computed here; files of rare kinds made by hand."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from vitrine.models.images.colour import to_rgb
from vitrine.models.images.decode import TRANSPARENT, ImageLimits, decode, from_pillow
from vitrine.models.images.errors import ImageError
from vitrine.models.images.formats import format_of

LIMITS = ImageLimits()
WIDTH, HEIGHT = 12, 7
rng = np.random.default_rng(5)
GREY = rng.integers(0, 2**16, (HEIGHT, WIDTH))  # of 16 bits; other depths are their upper bits
COLOUR = rng.integers(0, 2**16, (HEIGHT, WIDTH, 3))
ALPHA = rng.choice([0, 0x5555, 0xFFFF], (HEIGHT, WIDTH, 1))
PALETTE = rng.integers(0, 256, (256, 3))


def on_white(levels, alpha):
    """Levels of 8 bits [H, W, 3] under an opacity from 0 to 1 [H, W, 1]."""
    return levels * alpha + 255 * (1 - alpha)


def as_rgb(grey):
    return np.repeat(np.asarray(grey)[:, :, None], 3, axis=2)


def assert_shows(data, expected, tolerance=0):
    picture = decode(data, LIMITS)
    assert picture.image.mode == "RGB"
    difference = np.abs(np.asarray(picture.image).astype(float) - expected)
    assert difference.max() <= tolerance, difference.max()
    return picture.notes


# PNG, whose kinds are made by hand: Pillow writes few of them


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def packed(samples, depth):
    """Samples [H, W, C] of `depth` bits as PNG's rows."""
    rows = samples.reshape(HEIGHT, -1)
    if depth == 16:
        return [row.astype(">u2").tobytes() for row in rows]
    bits = ((rows[:, :, None] >> np.arange(depth)[::-1]) & 1).reshape(HEIGHT, -1).astype(np.uint8)
    return [np.packbits(row).tobytes() for row in bits]


def png(samples, depth, colour, *chunks):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", WIDTH, HEIGHT, depth, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in packed(samples, depth))))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_grey_of_every_depth(depth):
    levels = GREY >> (16 - depth)
    expected = levels >> 8 if depth == 16 else levels * 255 // (2**depth - 1)
    assert not assert_shows(png(levels, depth, 0), as_rgb(expected))


@pytest.mark.parametrize("depth", [8, 16])
def test_grey_with_opacity(depth):
    levels = np.concatenate([GREY[:, :, None], ALPHA], axis=2) >> (16 - depth)
    notes = assert_shows(png(levels, depth, 4), on_white(as_rgb(GREY >> 8), ALPHA / 0xFFFF), 1)
    assert [note.code for note in notes] == [TRANSPARENT]


@pytest.mark.parametrize("depth", [8, 16])
def test_colour_with_and_without_opacity(depth):
    assert not assert_shows(png(COLOUR >> (16 - depth), depth, 2), COLOUR >> 8)
    levels = np.concatenate([COLOUR, ALPHA], axis=2) >> (16 - depth)
    assert assert_shows(png(levels, depth, 6), on_white(COLOUR >> 8, ALPHA / 0xFFFF), 1)
    opaque = np.concatenate([COLOUR, np.full_like(ALPHA, 0xFFFF)], axis=2) >> (16 - depth)
    assert not assert_shows(png(opaque, depth, 6), COLOUR >> 8)


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_palettes_of_every_depth(depth):
    indices = GREY >> (16 - depth)
    palette = chunk(b"PLTE", PALETTE[: 2**depth].astype(np.uint8).tobytes())
    assert not assert_shows(png(indices, depth, 3, palette), PALETTE[indices])
    opacity = np.concatenate([[0, 85], np.full(254, 255)])
    notes = assert_shows(
        png(indices, depth, 3, palette, chunk(b"tRNS", bytes([0, 85]))),
        on_white(PALETTE[indices], opacity[indices][:, :, None] / 255),
        1,
    )
    assert bool(notes) == bool((indices < 2).any())


@pytest.mark.parametrize("depth", [8, 16])
def test_one_level_or_colour_named_transparent(depth):
    for colour, samples in ((0, GREY[:, :, None]), (2, COLOUR)):
        levels = samples >> (16 - depth)
        key = levels[3, 4]
        is_key = (levels == key).all(axis=2, keepdims=True)
        if depth == 16 and colour == 2:
            is_key = (levels >> 8 == key >> 8).all(axis=2, keepdims=True)  # as far as Pillow keeps its bits
        data = png(levels, depth, colour, chunk(b"tRNS", key.astype(">u2").tobytes()))
        shown = np.broadcast_to(samples >> 8, (HEIGHT, WIDTH, 3))
        assert assert_shows(data, np.where(is_key, 255, shown))


# TIFF, likewise


def tiff(rows, bits, photometric, samples=1, little=True):
    """An uncompressed TIFF in one strip. rows: bytes of each."""
    order = "<" if little else ">"
    pixels = b"".join(rows)
    entries = [
        (256, 3, WIDTH),
        (257, 3, HEIGHT),
        (258, 3, bits),
        (259, 3, 1),
        (262, 3, photometric),
        (273, 4, 8 + 2 + 12 * 8 + 4),
        (277, 3, samples),
        (279, 4, len(pixels)),
    ]
    directory = struct.pack(order + "H", len(entries))
    for tag, kind, value in entries:
        field = struct.pack(order + ("HH" if kind == 3 else "I"), *((value, 0) if kind == 3 else (value,)))
        directory += struct.pack(order + "HHI", tag, kind, 1) + field
    return (b"II*\0" if little else b"MM\0*") + struct.pack(order + "I", 8) + directory + bytes(4) + pixels


@pytest.mark.parametrize("little", [True, False])
def test_tiff_of_sixteen_bits(little):
    rows = [row.astype("<u2" if little else ">u2").tobytes() for row in GREY]
    assert_shows(tiff(rows, 16, 1, little=little), as_rgb(GREY >> 8))


def test_tiff_of_sixteen_bits_with_zero_as_white():
    rows = [row.astype("<u2").tobytes() for row in GREY]
    assert_shows(tiff(rows, 16, 0), as_rgb((0xFFFF - GREY) >> 8))


def test_tiff_of_twelve_bits():
    levels = GREY >> 4
    rows = [np.packbits(((row[:, None] >> np.arange(12)[::-1]) & 1).reshape(-1).astype(np.uint8)) for row in levels]
    assert_shows(tiff([row.tobytes() for row in rows], 12, 1), as_rgb(GREY >> 8))


@pytest.mark.parametrize("photometric", [0, 1])
def test_tiff_of_eight_bits(photometric):
    rows = [row.astype(np.uint8).tobytes() for row in GREY >> 8]
    assert_shows(tiff(rows, 8, photometric), as_rgb(GREY >> 8 if photometric else 255 - (GREY >> 8)))


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "LA", "CMYK", "P"])
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_deflate"])
def test_tiff_as_pillow_writes_it(encode, draw, mode, compression):
    image = draw().quantize(16) if mode == "P" else draw("RGB").convert(mode)
    assert_shows(encode(image, "TIFF", compression=compression), np.asarray(image.convert("RGB")))


# PNM, whose text is read as well as its bytes


@pytest.mark.parametrize("largest", [1, 255, 1023, 65535])
def test_pnm_of_every_depth(largest):
    levels = GREY % (largest + 1)
    kind = np.uint8 if largest < 256 else ">u2"
    shown = as_rgb(np.round(levels / largest * 65535).astype(int) >> 8)
    text = " ".join(map(str, levels.reshape(-1))).encode()
    header = f"{WIDTH} {HEIGHT}\n# a comment\n{largest}\n".encode()
    assert_shows(b"P5\n" + header + levels.astype(kind).tobytes(), shown, 1)
    assert_shows(b"P2\n" + header + text, shown, 1)


# What holds no picture


@pytest.mark.parametrize(
    ("dtype", "what"), [(np.int32, "whole numbers of 32 bits"), (np.float32, "fractions")], ids=["whole", "fractions"]
)
def test_numbers_without_a_white_are_refused(encode, dtype, what):
    data = encode(Image.fromarray(np.full((4, 4), 3).astype(dtype)), "TIFF")
    with pytest.raises(
        ImageError, match=f"the TIFF image has {what}, which are not supported; save it as RGB or grey"
    ) as caught:
        decode(data, LIMITS)
    assert caught.value.code == "unsupported_image"


def test_lab_becomes_its_colour(encode):
    lab = Image.new("LAB", (4, 4), (137, 208, 195))  # CIE 53.7, 80, 67: red
    assert_shows(encode(lab, "TIFF"), np.broadcast_to([255, 0, 0], (4, 4, 3)), 16)


def test_every_mode_of_pillow_becomes_rgb_or_is_refused():
    for mode in ("1", "L", "P", "RGB", "RGBA", "RGBX", "RGBa", "LA", "PA", "CMYK", "YCbCr", "HSV", "LAB", "I;16"):
        assert to_rgb(Image.new(mode, (3, 2)))[0].mode == "RGB", mode
    for mode in ("I", "F", "La"):
        with pytest.raises(ImageError, match=r"32 bits|fractions|La"):
            to_rgb(Image.new(mode, (3, 2)))


# Orientation and opacity of the other formats


@pytest.mark.parametrize("format", ["TIFF", "AVIF", "HEIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_other_formats(encode, format, orientation):
    stored = np.zeros((40, 60, 3), np.uint8)
    stored[:20, :30], stored[:20, 30:], stored[20:, :30] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    turned = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(stored, 1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {} if format == "TIFF" else {"quality": 95}
    data = encode(Image.fromarray(stored), format, exif=exif.tobytes() if format == "HEIF" else exif, **options)
    shown = np.asarray(decode(data, LIMITS).image)
    assert shown.shape == turned.shape
    assert np.abs(shown.astype(int) - turned).mean() < 6


@pytest.mark.parametrize("format", ["WEBP", "AVIF", "HEIF", "TIFF"])
def test_opacity_of_other_formats(encode, format):
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    image.paste((200, 30, 30, 255), (16, 0, 32, 32))
    picture = decode(encode(image, format), LIMITS)
    shown = np.asarray(picture.image).astype(int)
    assert np.abs(shown[:, 2:12] - 255).max() < 12
    assert np.abs(shown[:, 20:30] - (200, 30, 30)).max() < 20
    assert [note.code for note in picture.notes] == [TRANSPARENT]


@pytest.mark.parametrize(
    ("start", "format"),
    [
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "AVIF"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1heicmiaf", "HEIF"),
        (b"\0\0\0\x18ftypmsf1\0\0\0\0msf1hevc", "HEIF"),
        (b"\0\0\0\x18ftypavis\0\0\0\0avif", "AVIF"),
        (b"\0\0\0\x18ftypheix\0\0\0\0mif1", "HEIF"),
        (b"\0\0\0\x18ftypisom\0\0\0\0mp42", None),
        (b"P6\n1 1", "PPM"),
        (b"Photo of", None),
        (b"MM\0+", "TIFF"),
    ],
)
def test_formats_are_told_by_their_first_bytes(start, format):
    assert format_of(start) == format


def test_heic_without_its_package_says_which(encode, draw, monkeypatch):
    from vitrine.models.images import formats

    data = encode(draw(), "HEIF")
    monkeypatch.setitem(__import__("sys").modules, "pi_heif", None)
    formats._prepare_heif.cache_clear()
    with pytest.raises(ImageError, match=r"pip install 'vitrine\[heic\]'") as caught:
        decode(data, LIMITS)
    assert caught.value.code == "unsupported_image"
    monkeypatch.undo()
    assert decode(data, LIMITS).image.size == (50, 40)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "I;16"])
def test_images_that_are_open_already_become_the_same(encode, draw, mode):
    """Data sets that keep arrays hand over images, not files."""
    image = Image.fromarray(GREY.astype(np.uint16)) if mode == "I;16" else draw("RGB").convert(mode)
    again = Image.open(io.BytesIO(encode(image, "TIFF")))
    assert np.array_equal(from_pillow(image).image, from_pillow(again).image)
    assert np.array_equal(from_pillow(image).image, decode(encode(image, "TIFF"), LIMITS).image)
