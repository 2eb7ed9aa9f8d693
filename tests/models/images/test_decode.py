"""Bytes to pixels: equal to open_clip's transform, robust against every file, size-checked before decoding."""

import io
import struct
import zlib
from functools import cache

import numpy as np
import open_clip
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vitrine.models.bundle.manifest import Preprocessing
from vitrine.models.images import decode as decoding
from vitrine.models.images.decode import ImageLimits
from vitrine.models.images.errors import ImageError
from vitrine.models.images.formats import SIGNATURES
from vitrine.models.images.frame import to_pixels

LIMITS = ImageLimits(pixels=40_000_000, side=16_384)


def decode(data, limits=LIMITS):
    """The decoded RGB image."""
    return decoding.decode(data, limits).image


MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
SIZES = st.integers(1, 300)


def preprocessing(size=(32, 32), resize_mode="shortest", interpolation="bicubic"):
    return Preprocessing(size=size, mean=MEAN, std=STD, interpolation=interpolation, resize_mode=resize_mode)


def outcome(data, limits=LIMITS):
    """The decoded image, or the code of the refusal. Any other error fails the test."""
    try:
        return decode(data, limits)
    except ImageError as error:
        return error.code


def refusal(data, limits=LIMITS):
    """The code of the `ImageError` that decoding raises."""
    with pytest.raises(ImageError) as caught:
        decode(data, limits)
    return caught.value.code


# Equal to open_clip


@pytest.mark.parametrize("mode", ["RGB", "L"])
@settings(max_examples=60, deadline=None)
@given(width=SIZES, height=SIZES, seed=st.integers(0, 9))
def test_pixels_equal_the_clips_own_transform(clip, bundle, draw, mode, width, height, seed):
    image = draw(mode, (width, height), seed)
    pixels = to_pixels(image.convert("RGB"), bundle.manifest.preprocessing, LIMITS)
    assert pixels.dtype == np.float32
    assert pixels.flags["C_CONTIGUOUS"]
    np.testing.assert_allclose(pixels, clip.transform()(image).numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(
    ("resize_mode", "size"),
    [
        ("shortest", (32, 32)),
        ("squash", (32, 32)),
        ("squash", (32, 48)),
    ],
)
@settings(max_examples=30, deadline=None)
@given(width=SIZES, height=SIZES)
def test_pixels_equal_every_transform_a_manifest_can_name(draw, interpolation, resize_mode, size, width, height):
    image = draw(size=(width, height))
    transform = open_clip.image_transform(
        size, is_train=False, mean=MEAN, std=STD, interpolation=interpolation, resize_mode=resize_mode
    )
    pixels = to_pixels(image, preprocessing(size, resize_mode, interpolation), LIMITS)
    np.testing.assert_allclose(pixels, transform(image).numpy(), rtol=0, atol=1e-6)


def test_a_file_gives_the_pixels_that_open_clip_makes_of_it(clip, bundle, picture):
    data = picture("JPEG", size=(123, 77))
    with Image.open(io.BytesIO(data)) as image:
        expected = clip.transform()(image).numpy()
    pixels = to_pixels(decode(data, LIMITS), bundle.manifest.preprocessing, LIMITS)
    np.testing.assert_allclose(pixels, expected, rtol=0, atol=1e-6)


# Formats and modes


@pytest.mark.parametrize("format", SIGNATURES)
def test_formats_are_decoded_as_upright_rgb(draw, encode, format):
    image = decode(encode(draw(), format, **({"lossless": True} if format == "WEBP" else {})), LIMITS)
    assert (image.mode, image.size) == ("RGB", (50, 40))
    if format in ("PNG", "WEBP", "BMP", "TIFF", "PPM"):
        assert np.array_equal(np.asarray(image), np.asarray(draw()))
    else:
        difference = np.abs(np.asarray(image).astype(int) - np.asarray(draw()))
        assert difference.mean() < 25


def test_a_photo_with_a_second_picture_in_it_is_a_jpeg(draw, encode):
    two = encode(draw(), "MPO", save_all=True, append_images=[draw(seed=1)])  # as many phones write them
    assert np.array_equal(decode(two, LIMITS), decode(encode(draw(), "JPEG"), LIMITS))


ORANGE = (240, 130, 20)


@pytest.mark.parametrize(
    ("mode", "format", "colour", "expected"),
    [
        ("CMYK", "JPEG", (15, 125, 235, 0), ORANGE),
        ("CMYK", "JPEG", (0, 0, 0, 255), (0, 0, 0)),
        ("L", "PNG", 77, (77, 77, 77)),
        ("1", "PNG", 1, (255, 255, 255)),
        ("1", "BMP", 0, (0, 0, 0)),
        ("LA", "PNG", (77, 10), (248, 248, 248)),
        ("RGBA", "PNG", (*ORANGE, 255), ORANGE),
        ("RGBA", "PNG", (*ORANGE, 3), (255, 254, 252)),
        ("RGBA", "WEBP", (*ORANGE, 204), (243, 155, 67)),
        ("I;16", "PNG", 0x80FF, (0x80, 0x80, 0x80)),
        ("I;16", "PNG", 0xFFFF, (255, 255, 255)),
        ("I;16", "PNG", 0x00FF, (0, 0, 0)),
    ],
)
def test_modes_become_rgb(encode, mode, format, colour, expected):
    options = {"lossless": True} if format == "WEBP" else {"quality": 100} if format == "JPEG" else {}
    image = decode(encode(Image.new(mode, (20, 10), colour), format, **options), LIMITS)
    assert (image.mode, image.size) == ("RGB", (20, 10))
    assert np.asarray(image).reshape(-1, 3).tolist() == [pytest.approx(expected, abs=6)] * 200


@pytest.mark.parametrize("format", ["PNG", "GIF", "BMP"])
def test_palettes_become_their_colours(draw, encode, format):
    palette = draw().quantize(16)
    assert np.array_equal(decode(encode(palette, format), LIMITS), palette.convert("RGB"))


@pytest.mark.parametrize(("format", "transparency"), [("PNG", 0), ("PNG", bytes([0, 100, 255])), ("GIF", 0)])
def test_palettes_with_transparency_lie_on_white(draw, encode, format, transparency):
    palette = draw().quantize(16)
    image = decode(encode(palette, format, transparency=transparency), LIMITS)
    opacity = np.full(256, 255)
    opacity[: len(transparency) if isinstance(transparency, bytes) else 1] = np.frombuffer(
        transparency if isinstance(transparency, bytes) else b"\0", np.uint8
    )
    alpha = opacity[np.asarray(palette)][:, :, None] / 255
    expected = np.asarray(palette.convert("RGB")) * alpha + 255 * (1 - alpha)
    assert np.abs(np.asarray(image) - expected).max() <= 1


def test_colours_are_looked_up_before_resizing(encode):
    """Red beside blue, at palette indices 0 and 2 with green between them: blending indices would show green."""
    image = Image.new("P", (64, 64))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.paste(2, (32, 0, 64, 64))
    pixels = to_pixels(decode(encode(image), LIMITS), preprocessing((8, 8)), LIMITS)
    green = pixels[1] * STD[1] + MEAN[1]
    assert green.max() < 0.1


def test_sixteen_bits_a_channel_keep_the_upper_eight(encode):
    """Pillow cannot write 16-bit RGB, so the file is made by hand."""
    row = b"\0" + struct.pack(">HHH", 0x12FF, 0x8000, 0xFF00) * 4
    assert set(decode(png(4, 3, row * 3, depth=16), LIMITS).get_flattened_data()) == {(0x12, 0x80, 0xFF)}


def test_sixteen_bit_grey_keeps_its_gradient(encode):
    levels = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    image = decode(encode(Image.fromarray(levels)), LIMITS)
    assert np.array_equal(np.asarray(image)[:, :, 0], levels >> 8)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_is_taken(encode, format):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], duration=100, **options)
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 3
    assert set(decode(data, LIMITS).get_flattened_data()) == {(255, 0, 0)}


# Orientation

TURNED = {  # EXIF orientation -> what a viewer does with the stored picture [H, W, 3]
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].transpose(1, 0, 2),
    8: lambda stored: np.rot90(stored, 1),
}


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
@pytest.mark.parametrize("orientation", TURNED)
def test_exif_orientation_is_applied(draw, encode, format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    image = decode(encode(draw(), format, exif=exif, **options), LIMITS)
    assert np.array_equal(image, TURNED[orientation](np.asarray(draw())))


def test_exif_orientation_of_a_jpeg_is_applied(draw, encode):
    exif = Image.Exif()
    exif[0x0112] = 6
    turned, plain = decode(encode(draw(), "JPEG", exif=exif), LIMITS), decode(encode(draw(), "JPEG"), LIMITS)
    assert np.array_equal(turned, np.rot90(plain, -1))


def test_orientation_comes_before_the_crop(draw, encode, bundle):
    exif = Image.Exif()
    exif[0x0112] = 8
    stored = draw(size=(90, 40))
    upright = Image.fromarray(np.ascontiguousarray(np.rot90(np.asarray(stored))))
    pixels = to_pixels(decode(encode(stored, exif=exif), LIMITS), bundle.manifest.preprocessing, LIMITS)
    assert np.array_equal(pixels, to_pixels(upright, bundle.manifest.preprocessing, LIMITS))


def exif_block(*entries):
    """EXIF with entries (tag, type, count, value bytes of at most 4), little endian."""
    packed = b"".join(struct.pack("<HHI4s", tag, kind, count, value) for tag, kind, count, value in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + packed + b"\0\0\0\0"


ORIENTATION_6 = (0x0112, 3, 1, b"\6\0")
ODD_EXIF = {
    "junk": (b"Exif\0\0junk and no TIFF header", False),
    "an offset beyond the end": (b"Exif\0\0II*\0\xff\xff\xff\xff", False),
    "orientation 0": (exif_block((0x0112, 3, 1, b"\0\0")), False),
    "orientation 9": (exif_block((0x0112, 3, 1, b"\t\0")), False),
    "orientation as text": (exif_block((0x0112, 2, 2, b"6\0")), False),
    "orientation twice": (exif_block((0x0112, 3, 2, b"\6\0\6\0")), True),
    "a block beyond the end": (exif_block(ORIENTATION_6, (0x8769, 4, 1, b"\xff\xff\xff\x7f")), True),
    "resolution as text": (exif_block(ORIENTATION_6, (0x011A, 2, 4, b"72 \0")), True),
    "a signed number where none is": (exif_block((0x0103, 8, 1, b"\xff\xff"), ORIENTATION_6), True),
    "NaN for a resolution": (exif_block(ORIENTATION_6, (0x011B, 11, 1, b"\0\0\xc0\x7f")), True),
}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow's warnings about odd files
@pytest.mark.parametrize("case", ODD_EXIF)
def test_odd_exif_does_not_spoil_a_good_picture(draw, encode, case):
    exif, turned = ODD_EXIF[case]
    image = decode(encode(draw(), "JPEG", exif=exif), LIMITS)
    assert image.size == ((40, 50) if turned else (50, 40))


@pytest.mark.parametrize("error", [SyntaxError, ValueError, struct.error, OSError])
def test_exif_that_cannot_be_read_does_not_spoil_a_good_picture(draw, encode, monkeypatch, error):
    def fail(self):
        raise error("not a TIFF file")

    monkeypatch.setattr(Image.Image, "getexif", fail)
    assert decode(encode(draw()), LIMITS).size == (50, 40)


# Limits


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, rows=b"", depth=8, colour=2):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def bmp(width, height):
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + info


def gif(width, height):
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + frame(width, height)


def frame(width, height):
    return b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x08\x00;"


def jpeg(width, height):
    size = struct.pack(">HBHHB", 11, 8, height, width, 1) + b"\1\x11\0"
    return b"\xff\xd8\xff\xc0" + size + b"\xff\xda" + struct.pack(">H", 8) + b"\1\1\0\0\x3f\0" + b"\xff\xd9"


def webp(width, height):
    """A canvas of this size with one frame of 8 x 8 on it."""

    def chunk(kind, body):
        return kind + struct.pack("<I", len(body)) + body

    def minus_one(number):
        return (number - 1).to_bytes(3, "little")

    canvas = chunk(b"VP8X", b"\2\0\0\0" + minus_one(width) + minus_one(height))
    frame = chunk(b"ANMF", bytes(6) + minus_one(8) * 2 + bytes(4) + EIGHT_BY_EIGHT)
    return chunk(b"RIFF", b"WEBP" + canvas + chunk(b"ANIM", bytes(6)) + frame)


def lossless_webp():
    buffer = io.BytesIO()
    Image.new("RGBA", (8, 8)).save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()[12:]


EIGHT_BY_EIGHT = lossless_webp()


WITH_HEADERS = {"png": png, "bmp": bmp, "gif": gif, "jpeg": jpeg, "webp": webp}


@pytest.fixture
def nothing_is_decoded(monkeypatch):
    """Fail when pixels are read."""

    def load(self):
        raise AssertionError(f"{self.size} were decoded")

    for plugin in (Image.Image, *(Image.OPEN[format][0] for format in SIGNATURES if format in Image.OPEN)):
        if isinstance(plugin, type):
            monkeypatch.setattr(plugin, "load", load)


@pytest.mark.parametrize("make", WITH_HEADERS.values(), ids=WITH_HEADERS)
@pytest.mark.parametrize(("width", "height"), [(101, 10), (10, 101), (60, 60)])
@pytest.mark.usefixtures("nothing_is_decoded")
def test_size_is_checked_on_the_header(make, width, height):
    assert refusal(make(width, height), ImageLimits(pixels=3000, side=100)) == "image_too_large"


@pytest.mark.parametrize("make", [png, bmp, gif, jpeg], ids=["png", "bmp", "gif", "jpeg"])
@pytest.mark.usefixtures("nothing_is_decoded")
def test_the_default_limits_hold_for_every_format(make):
    assert refusal(make(16_385, 1)) == "image_too_large"
    assert refusal(make(16_384, 16_384)) == "image_too_large"


@pytest.mark.usefixtures("nothing_is_decoded")
def test_a_gif_frame_larger_than_its_screen_is_too_large():
    assert refusal(b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0, 0, 0) + frame(60_000, 60_000)) == "image_too_large"


def test_an_image_of_exactly_the_limits_is_taken(picture):
    assert decode(picture(size=(50, 40)), ImageLimits(pixels=2000, side=50)).size == (50, 40)
    assert refusal(picture(size=(50, 40)), ImageLimits(pixels=1999, side=50)) == "image_too_large"
    assert refusal(picture(size=(50, 40)), ImageLimits(pixels=2000, side=49)) == "image_too_large"


@pytest.mark.parametrize("size", [(2000, 1), (1, 2000)])
def test_an_image_too_elongated_to_resize_is_too_large(size):
    with pytest.raises(ImageError) as caught:
        to_pixels(Image.new("RGB", size), preprocessing(), ImageLimits(pixels=32 * 64_000 - 1, side=9999))
    assert caught.value.code == "image_too_large"
    pixels = to_pixels(Image.new("RGB", size, "red"), preprocessing(), ImageLimits(pixels=32 * 64_000, side=9999))
    assert pixels.shape == (3, 32, 32)
    squashed = to_pixels(Image.new("RGB", size), preprocessing(resize_mode="squash"), ImageLimits(1, 1))
    assert squashed.shape == (3, 32, 32)


def test_a_progressive_jpeg_of_very_many_scans_is_refused(picture):
    """Its decoder goes over the whole picture for each scan: 300 kB can take a minute."""
    data = picture("JPEG", progressive=True)
    scan = data.rindex(b"\xff\xda")
    with pytest.raises(ImageError):
        decode(data[:scan] + data[scan:-2] * 1000 + data[-2:], LIMITS)


def test_a_second_picture_does_not_hide_the_scans(draw, encode):
    two = encode(draw(), "MPO", save_all=True, append_images=[draw()], progressive=True)
    end = two.index(b"\xff\xd9\xff\xd8")
    scan = two.rindex(b"\xff\xda", 0, end)
    assert refusal(two[:end] + two[scan:end] * 1000 + two[end:]) == "invalid_image"


def test_a_marker_without_a_length_does_not_hide_the_scans(encode):
    """TEM (FF 01) has no length; a parser that reads the next two bytes as a length skips 65,535 bytes of scans."""
    data = encode(Image.new("L", (50, 40)), "JPEG", progressive=True)
    scan = data.rindex(b"\xff\xda")
    assert refusal(data[:scan] + b"\xff\x01\xff" + data[scan:-2] * 500 + data[-2:]) == "invalid_image"


@pytest.mark.parametrize("progressive", [False, True])
def test_what_follows_a_jpeg_is_not_taken_for_scans(picture, progressive):
    """Phones append a video of some seconds: megabytes in which any two bytes occur a hundred times or more."""
    data = picture("JPEG", progressive=progressive)
    assert decode(data + b"\xff\xda" * 1000, LIMITS).size == (50, 40)


def test_progressive_jpegs_are_taken(picture):
    assert decode(picture("JPEG", progressive=True), LIMITS).size == (50, 40)


# Damaged files


def valid_files():
    """Small files of every format and of more complex kinds: (format, image, options of the writer)."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (17, 23, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    frames = {"save_all": True, "append_images": [noise.rotate(90)]}
    for format in SIGNATURES.keys() - {"HEIF"}:
        yield format, noise, {"exif": exif} if format in ("JPEG", "PNG", "WEBP") else {}
    yield "JPEG", noise.convert("CMYK"), {"progressive": True}
    yield "PNG", noise.quantize(16), {"transparency": bytes([0, 99])}
    yield "PNG", Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20)), {}
    yield "PNG", noise.convert("1"), {}
    yield "WEBP", noise.convert("RGBA"), {"lossless": True}
    yield "WEBP", noise, frames
    yield "GIF", noise, frames
    yield "BMP", noise.quantize(16), {}


@cache
def encoded_files():
    buffers = []
    for format, image, options in valid_files():
        buffers.append(io.BytesIO())
        image.save(buffers[-1], format, **options)
    return [buffer.getvalue() for buffer in buffers]


def with_correct_checksums(data):
    """A PNG with corrected chunk checksums, so that damage passes the checks."""
    position, out = 8, data[:8]
    while len(data) >= position + 12:
        length = struct.unpack(">I", data[position : position + 4])[0]
        if length > len(data) - position - 12:
            break
        out += chunk(data[position + 4 : position + 8], data[position + 8 : position + 8 + length])
        position += 12 + length
    return out + data[position:]


@st.composite
def damaged_files(draw):
    data = draw(st.sampled_from(encoded_files()))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, min(len(data), draw(st.sampled_from([60, 200, len(data)])))))
        length = draw(st.integers(1, 8))
        new = draw(st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"]))
        data = draw(
            st.sampled_from(
                [
                    data[:at] + new + data[at + len(new) :],
                    data[:at] + new + data[at:],
                    data[:at] + data[at + length :],
                    data[:at],
                    data[:at] + data[at:][::-1],
                ]
            )
        )
    return with_correct_checksums(data) if data.startswith(b"\x89PNG") and draw(st.booleans()) else data


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow's warnings about odd files
@settings(max_examples=400, deadline=None)
@given(data=damaged_files())
def test_damaged_files_are_decoded_or_refused_and_nothing_else(data):
    result = outcome(data, ImageLimits(pixels=1_000_000, side=16_384))
    if isinstance(result, Image.Image):
        assert result.mode == "RGB"
        assert result.width * result.height <= 1_000_000
    else:
        assert result in ("invalid_image", "unsupported_image", "image_too_large")


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=200))
def test_bytes_at_random_are_refused(data):
    assert refusal(data) in ("invalid_image", "unsupported_image")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow's warnings about odd files
@pytest.mark.parametrize("format", SIGNATURES)
def test_a_file_cut_short_anywhere_is_decoded_or_refused(picture, format):
    data = picture(format, size=(8, 6))
    for end in range(len(data)):
        result = outcome(data[:end])
        assert result in ("invalid_image", "unsupported_image") or result.size == (8, 6)


@pytest.mark.parametrize(
    "chunks",
    [
        [chunk(b"IHDR", b"short")],
        [chunk(b"IDAT", zlib.compress(b"abc"))],
        [chunk(b"IHDR", b"\0\0\0\x09\0\0\0\x09\x08\2\0\0\0"), chunk(b"IDAT", b"x"), chunk(b"\xfc\0\0\0", b"")],
        [
            chunk(b"IHDR", b"\0\0\0\x09\0\0\0\x09\x08\2\0\0\0"),
            chunk(b"iCCP", b"x\0\0" + b"x" * 20),
            chunk(b"IEND", b""),
        ],
    ],
    ids=["short header", "no header", "bad chunk name", "bad profile and no data"],
)
def test_malformed_pngs_are_refused(chunks):
    assert refusal(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)) in ("invalid_image", "unsupported_image")


def test_an_empty_file_is_invalid():
    assert refusal(b"") == "invalid_image"


@pytest.mark.parametrize("format", ["ICO", "TGA", "EPS", "PDF", "JPEG2000"])
def test_other_formats_are_unsupported(picture, format):
    assert refusal(picture(format)) == "unsupported_image"
