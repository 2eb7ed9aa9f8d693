"""What decides nothing about pixels never decides whether an image is read; what is missing is never made up."""

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vitrine.models.images import jpeg
from vitrine.models.images.decode import REDUCED, WITHOUT_END, ImageLimits, decode
from vitrine.models.images.errors import ImageError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow's warnings about odd files
LIMITS = ImageLimits()


def pixels(data):
    return np.asarray(decode(data, LIMITS).image)


def chunk(name, body, sum=None):
    return (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body) if sum is None else sum)
    )


def segment(marker, body):
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


# JPEG without its end

KINDS = {
    "plain": {},
    "progressive": {"progressive": True},
    "restart markers": {"restart_marker_rows": 1},
    "whole chroma": {"subsampling": 0},
    "fine": {"quality": 100},
}


@pytest.fixture(scope="module", params=KINDS)
def photo(request, draw, encode):
    return encode(draw(size=(61, 45)), "JPEG", **{"quality": 80, **KINDS[request.param]})


@pytest.mark.parametrize("tail", [b"", b"\xff", b"\0" * 512, b"\n"])
def test_a_jpeg_without_its_end_is_whole_if_its_pixels_are(photo, tail):
    picture = decode(photo[:-2] + tail, LIMITS)
    assert np.array_equal(picture.image, pixels(photo))
    assert [note.code for note in picture.notes] == [WITHOUT_END]
    assert not decode(photo, LIMITS).notes


@pytest.mark.parametrize("fill", [b"", b"\0"])
def test_a_jpeg_cut_short_anywhere_is_refused_or_shows_every_pixel(photo, fill):
    whole, scan = pixels(photo), photo.index(b"\xff\xda")
    refused = 0
    for end in [*range(scan, len(photo) - 40, 97), *range(len(photo) - 40, len(photo) - 2)]:
        try:
            picture = decode(photo[:end] + fill * (len(photo) - end), LIMITS)
        except ImageError:
            refused += 1
        else:
            assert np.array_equal(picture.image, whole), f"cut at {end} of {len(photo)}"
    assert refused > 20


def test_a_progressive_jpeg_cut_between_two_scans_is_refused(draw, encode):
    data = encode(draw(), "JPEG", progressive=True)
    scans = [found.start for found in jpeg._segments(data) if found.marker == 0xDA]
    assert len(scans) > 5
    for end in scans[1:]:
        with pytest.raises(ImageError, match="cut short: pixels are missing"):
            decode(data[:end], LIMITS)


# Ancillary parts

BAD_CHUNKS = {
    "a profile that unpacks to two megabytes": chunk(b"iCCP", b"scanner\0\0" + zlib.compress(bytes(2_000_000))),
    "a profile that does not unpack": chunk(b"iCCP", b"x\0\0" + b"no zlib"),
    "a profile of an unknown method": chunk(b"iCCP", b"x\0\7" + zlib.compress(b"abc")),
    "a wrong sum": chunk(b"tEXt", b"a\0b", sum=1),
    "a text that unpacks to two megabytes": chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(2_000_000))),
    "an Exif text that unpacks to two megabytes": chunk(
        b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(bytes(2_000_000))
    ),
    "an international text": chunk(b"iTXt", b"\xff\xff"),
    "a short resolution": chunk(b"pHYs", b"\1"),
    "a short gamma": chunk(b"gAMA", b"\1"),
    "short colours": chunk(b"cHRM", b"\1"),
    "a short rendering intent": chunk(b"sRGB", b""),
    "a short animation": chunk(b"acTL", b"\0"),
    "a frame out of order": chunk(b"fcTL", struct.pack(">IIIIIHHBB", 9, 50, 40, 0, 0, 1, 1, 0, 0)),
    "no frames": chunk(b"acTL", bytes(8)),
    "Exif of junk": chunk(b"eXIf", b"junk"),
    "Exif with a wrong sum": chunk(b"eXIf", b"II*\0\x08\0\0\0\0\0\0\0\0\0", sum=1),
    "transparency with a wrong sum": chunk(b"tRNS", bytes(6), sum=1),
    "unknown": chunk(b"vpAg", b"\0" * 9),
}


@pytest.mark.parametrize("case", BAD_CHUNKS)
@pytest.mark.parametrize("where", ["before", "after"])
def test_what_a_png_need_not_have_never_decides(draw, encode, case, where):
    data = encode(draw())
    at = 33 if where == "before" else data.index(b"IEND") - 4
    assert np.array_equal(pixels(data[:at] + BAD_CHUNKS[case] + data[at:]), pixels(data))


def test_a_png_cut_in_what_follows_its_pixels_is_whole(draw, encode):
    data = encode(draw())
    end = data.index(b"IEND") - 4
    for cut in (data[:end], data[: end + 6], data[:end] + chunk(b"tEXt", b"a\0" + b"b" * 99)[:40]):
        assert np.array_equal(pixels(cut), pixels(data))


@pytest.mark.parametrize("name", [b"tEXt", b"zTXt"])
def test_an_exif_text_turns_a_png(draw, encode, name):
    exif = Image.Exif()
    exif[0x0112] = 6
    block = exif.tobytes()
    body = f"\nexif\n{len(block):8}\n{block.hex()}\n".encode()
    text = b"Raw profile type exif\0" + (b"\0" + zlib.compress(body) if name == b"zTXt" else body)
    data = encode(draw())
    assert np.array_equal(pixels(data[:33] + chunk(name, text) + data[33:]), np.rot90(np.asarray(draw()), -1))


BAD_SEGMENTS = {
    "a short JFIF": segment(0xE0, b"JFIF"),
    "a short Adobe": segment(0xEE, b"Adobe"),
    "a short profile": segment(0xE2, b"ICC_PROFILE\0"),
    "a torn second picture": segment(0xE2, b"MPF\0II*\0\xff\xff\xff\xff"),
    "torn Photoshop data": segment(0xED, b"Photoshop 3.0\x008BIM\x03\xed"),
    "Exif of junk": segment(0xE1, b"Exif\0\0junk"),
    "a comment": segment(0xFE, b"\xff\xd9\xff\xda"),
    "junk after a segment": segment(0xE9, b"") + b"\1\2\3\xff\xd0",
}


@pytest.mark.parametrize("case", BAD_SEGMENTS)
def test_what_a_jpeg_need_not_have_never_decides(draw, encode, case):
    data = encode(draw(), "JPEG")
    assert np.array_equal(pixels(data[:2] + BAD_SEGMENTS[case] + data[2:]), pixels(data))


@pytest.mark.parametrize("format", ["WEBP", "HEIF", "JPEG", "PNG"])  # Pillow writes no torn Exif into AVIF
@pytest.mark.parametrize("exif", [b"junk", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12"])
def test_torn_exif_never_decides(draw, encode, format, exif):
    if format == "PNG":
        data = encode(draw())
        torn = data[:33] + chunk(b"eXIf", exif.removeprefix(b"Exif\0\0")) + data[33:]
    else:
        options = {"lossless": True} if format == "WEBP" else {"quality": 95}
        data, torn = encode(draw(), format, **options), encode(draw(), format, exif=exif, **options)
    assert np.array_equal(pixels(torn), pixels(data))


@pytest.mark.parametrize("progressive", [False, True])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_jpeg_keeps_all_that_its_pixels_need(draw, encode, progressive, data):
    """Whatever is put between its segments, the pixels are what Pillow alone makes of the file without it."""
    whole = encode(draw(), "JPEG", progressive=progressive)
    extra = data.draw(
        st.lists(st.tuples(st.integers(0xE1, 0xED), st.binary(max_size=30)).filter(lambda s: b"Exif" not in s[1]))
    )
    starts = [found.start for found in jpeg._segments(whole) if found.marker != 0xDA]
    at = data.draw(st.sampled_from(starts))
    mixed = whole[:at] + b"".join(segment(*each) for each in extra) + whole[at:]
    assert np.array_equal(pixels(mixed), np.asarray(Image.open(io.BytesIO(whole)).convert("RGB")))


# Large JPEGs


def test_a_large_jpeg_is_read_at_a_reduced_size(encode, monkeypatch):
    monkeypatch.setattr(jpeg, "FULL_SIZE_PIXELS", 10_000)
    limits = ImageLimits(pixels=10_000, side=4_000, jpeg_pixels=640_000)
    ramp = np.linspace(0, 255, 400).astype(np.uint8)
    for size, scale in ((100, 1), (101, 2), (200, 2), (201, 4), (399, 4), (401, 8), (800, 8)):
        image = Image.fromarray(np.broadcast_to(ramp, (400, 400))).resize((size, size)).convert("RGB")
        picture = decode(encode(image, "JPEG", quality=95), limits)
        side = -(-size // scale)
        assert picture.image.size == (side, side)
        assert [note.code for note in picture.notes] == ([REDUCED] if scale > 1 else [])
        difference = np.asarray(picture.image).astype(int) - np.asarray(
            image.resize((side, side), Image.Resampling.BOX)
        )
        assert np.abs(difference).mean() < 3
    for data, most in (
        (encode(Image.new("L", (801, 800)), "JPEG"), "640,000"),
        (encode(Image.new("L", (101, 100))), "10,000"),
    ):
        with pytest.raises(ImageError, match=f"at most 4,000 per side and {most} in total"):
            decode(data, limits)


def test_who_allows_fewer_pixels_allows_fewer_of_a_jpeg_too(encode):
    """The pixels of an image must not depend on limits: none is reduced to fit into smaller ones."""
    with pytest.raises(ImageError, match="in total"):
        decode(encode(Image.new("L", (200, 200)), "JPEG"), ImageLimits(10_000, 4_000, 200_000_000))


@pytest.mark.parametrize("format", ["AVIF", "HEIF"])
def test_a_wrong_byte_anywhere_is_an_image_or_an_error_of_ours(draw, encode, format):
    """Their libraries raise what Pillow's own decoders never do."""
    data = encode(draw(size=(16, 16)), format)
    refused = 0
    for at in range(0, len(data), max(1, len(data) // 500)):
        for wrong in (0, data[at] ^ 0x55):
            try:
                decode(data[:at] + bytes([wrong]) + data[at + 1 :], LIMITS)
            except ImageError:
                refused += 1
    assert refused > 100
