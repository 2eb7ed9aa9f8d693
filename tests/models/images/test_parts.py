"""Files of very many parts are refused, quickly; files with as many as cameras and programs write are decoded."""

import io
import struct
import time
import zlib

import pytest
from PIL import Image

from vitrine.models.images import decode as decoding
from vitrine.models.images import parts
from vitrine.models.images.decode import ImageLimits
from vitrine.models.images.errors import ImageError

LIMITS = ImageLimits(pixels=40_000_000, side=16_384)


def decode(data, limits=LIMITS):
    """The decoded RGB image."""
    return decoding.decode(data, limits).image


SECONDS = 10  # a bound for any machine; most take milliseconds, the old code minutes for some
MIB = 2**20


def encoded(format, image=None, **options):
    buffer = io.BytesIO()
    (image or Image.new("RGB", (50, 40), (200, 100, 50))).save(buffer, format, **options)
    return buffer.getvalue()


def jpeg(*segments):
    """A JPEG without JFIF header, with these segments before its own."""
    data = encoded("JPEG")
    return data[:2] + b"".join(segments) + data[20:]


def segment(marker, body):
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(before=b"", pixels=None, after=b""):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 50, 40, 8, 2, 0, 0, 0))
    pixels = pixels or chunk(b"IDAT", zlib.compress(bytes(151 * 40)))
    return b"\x89PNG\r\n\x1a\n" + header + before + pixels + after + chunk(b"IEND", b"")


def gif(before):
    """A GIF with these blocks before its first frame."""
    data = encoded("GIF", Image.new("L", (50, 40)))
    first = 13 + (3 << ((data[10] & 7) + 1) if data[10] & 128 else 0)
    return data[:first] + before + data[first:]


def bmp(width, height, runs):
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, 0, 0, 0, 0, 0)
    palette = b"".join(bytes([level, 0, 1, 0]) for level in range(256))
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 54 + 1024) + info + palette + runs


def exif(*entries, numbers=b""):
    """TIFF with entries (tag, type, count, offset or value), then numbers at offset 8 + 2 + 12 a entry + 4."""
    return (
        b"II*\0\x08\0\0\0"
        + struct.pack("<H", len(entries))
        + b"".join(struct.pack("<HHII", *entry) for entry in entries)
        + bytes(4)
        + numbers
    )


def fill(part, size=4 * MIB):
    return part * (size // len(part))


UNPACKED = zlib.compress(bytes(MIB - 9), 9)
RATIONALS = exif((0x112, 5, 400_000, 26), numbers=b"\1\0\0\0\3\0\0\0" * 400_000)
COSTLY = {
    "Exif segments": lambda: jpeg(fill(segment(0xE1, b"Exif\0\0" + b"x" * 6), 2 * MIB)),
    "Exif over many segments": lambda: jpeg(
        *(segment(0xE1, b"Exif\0\0" + RATIONALS[at : at + 65_000]) for at in range(0, len(RATIONALS), 65_000))
    ),
    "small segments": lambda: jpeg(fill(segment(0xE2, b""))),
    "comments": lambda: jpeg(fill(segment(0xFE, b""))),
    "profile segments": lambda: jpeg(fill(segment(0xE2, b"ICC_PROFILE\0\1\1"))),
    "frame headers": lambda: jpeg(fill(segment(0xC0, b"\x08\0\x28\0\x32\3" + b"\1\x22\0" * 21_000))),
    "quantization tables": lambda: jpeg(fill(segment(0xDB, (b"\0" + b"\1" * 64) * 1000))),
    "texts": lambda: png(fill(chunk(b"tEXt", b"a\0"))),
    "unknown chunks": lambda: png(after=fill(chunk(b"abCd", b""))),
    "empty pixel chunks": lambda: png(pixels=fill(chunk(b"IDAT", b""))),
    "empty pixel chunks at the end": lambda: png(after=fill(chunk(b"IDAT", b""))),
    "a large Exif chunk": lambda: png(chunk(b"eXIf", RATIONALS)),
    "a large Exif chunk at the end": lambda: png(after=chunk(b"eXIf", RATIONALS)),
    "a large Exif text": lambda: png(
        chunk(b"tEXt", b"Raw profile type exif\0\nexif\n1\n" + (b"Exif\0\0" + RATIONALS).hex().encode())
    ),
    "a comment in small blocks": lambda: gif(b"!\xfe" + fill(b"\1a") + b"\0"),
    "an application's small blocks": lambda: gif(b"!\xff\x0bABCDEFGHIJK" + fill(b"\1a") + b"\0"),
    "extensions": lambda: gif(fill(b"!\xf9\4\0\0\0\0\0")),
    "empty extensions": lambda: gif(fill(b"!\xfe\0")),
    "junk before a frame": lambda: gif(bytes(MIB)),
    "short runs": lambda: bmp(4000, 2000, fill(b"\0\2\0\0")),
    "a large picture in runs": lambda: bmp(16_384, 2440, b"\1a\0\0" * 2440),  # 10 kB; each pixel is a step
}


@pytest.mark.parametrize("case", COSTLY)
def test_a_file_of_very_many_parts_is_refused_soon(case):
    data, start = COSTLY[case](), time.process_time()
    with pytest.raises(ImageError) as caught:
        decode(data, LIMITS)
    assert time.process_time() - start < SECONDS
    assert caught.value.code == "image_too_costly"
    assert "save it again" in caught.value.message


FRAMES = [Image.new("L", (16, 16), level) for level in range(200)]
REAL = {
    "extended XMP": lambda: jpeg(*[segment(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + bytes(65_000))] * 300),
    "a profile in 255 segments": lambda: jpeg(
        *(segment(0xE2, b"ICC_PROFILE\0" + bytes([number, 255]) + bytes(65_000)) for number in range(1, 256))
    ),
    "Exif over several segments": lambda: jpeg(*[segment(0xE1, b"Exif\0\0" + bytes(65_000))] * 10),
    "pixels in thousands of chunks": lambda: (
        lambda packed: png(pixels=b"".join(chunk(b"IDAT", packed[at : at + 1]) for at in range(len(packed))))
    )(zlib.compress(bytes(151 * 40), 0)),
    "texts, some packed": lambda: png(
        chunk(b"tEXt", b"a\0b") * 500 + chunk(b"zTXt", b"a\0\0" + zlib.compress(b"b")) * 50
    ),
    "packed profiles": lambda: png(fill(chunk(b"iCCP", b"a\0\0" + UNPACKED))),
    "damaged packed texts": lambda: png(fill(chunk(b"zTXt", b"a\0\0" + UNPACKED[:-4] + b"AAAA"))),
    "padding": lambda: jpeg(segment(0xE2, b""), b"\xff" * MIB),
    "junk": lambda: jpeg(segment(0xE2, b""), b"\1" * MIB),
    "restart markers": lambda: jpeg(segment(0xE2, b""), fill(b"\xff\xd0", MIB)),
    "a film": lambda: encoded("GIF", FRAMES[0], save_all=True, append_images=FRAMES[1:]),
    "XMP in a GIF": lambda: gif(b"!\xff\x0bXMP DataXMP" + (b"\x20" + b"x" * 32) * 30_000 + b"\0"),
    "an animation": lambda: encoded("WEBP", FRAMES[0], save_all=True, append_images=FRAMES[1:]),
    "a screen in short runs": lambda: bmp(1920, 1080, (b"\5a" * 384 + b"\0\0") * 1080),
}


@pytest.mark.parametrize("case", REAL)
def test_a_real_file_of_many_parts_is_decoded(case):
    assert decode(REAL[case](), LIMITS).mode == "RGB"


def test_the_number_of_parts_alone_is_not_enough(monkeypatch):
    """Few parts can be costly: joined in quadratic time, unpacked to a megabyte each, taken apart byte by byte."""
    monkeypatch.setattr(parts, "MAX_READS", {})
    monkeypatch.setattr(parts, "FEW_READS", 10**9)
    for case in ("Exif segments", "quantization tables"):
        with pytest.raises(ImageError, match=r"too many|too large"):
            decode(COSTLY[case](), LIMITS)


def test_a_turned_picture_with_its_exif_in_two_segments_is_turned():
    """Pillow joins them; the orientation is in the first, what makes it large in the second."""
    start = exif((0x112, 3, 1, 6))
    data = jpeg(segment(0xE1, b"Exif\0\0" + start), segment(0xE1, b"Exif\0\0" + bytes(60_000)))
    assert decode(data, LIMITS).size == (40, 50)
