"""The same bytes give the same pixels, whoever reads them: training, cards, evaluation, bulk, replay, page, service."""

import ast
import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from common import ROOT
from vitrine.models.images.decode import ImageLimits, decode
from vitrine.models.images.frame import to_pixels
from vitrine.service.engine.decoders import Decoders
from vitrine.service.exports.html_file import image_url
from vitrine.training.data.sources import open_images
from vitrine.training.recipes.image_sources import FolderSource

LIMITS = ImageLimits()


@pytest.fixture(scope="module")
def odd_files(draw, encode):
    """Files that programs read differently, by name."""
    exif = Image.Exif()
    exif[0x0112] = 6
    clear = Image.new("RGBA", (60, 40), (0, 0, 0, 0))
    clear.paste((200, 30, 30, 255), (10, 10, 50, 30))
    deep = Image.fromarray(np.linspace(0, 65535, 60 * 40).astype(np.uint16).reshape(40, 60))
    jpeg = encode(draw(), "JPEG")
    return {
        "deep.png": encode(deep),
        "deep.tif": encode(deep, "TIFF"),
        "clear.png": encode(clear),
        "clear.webp": encode(clear, "WEBP", lossless=True),
        "clear.heic": encode(clear, "HEIF"),
        "palette.gif": encode(draw().quantize(16), "GIF", transparency=0),
        "turned.jpg": encode(draw(), "JPEG", exif=exif),
        "cmyk.jpg": encode(draw().convert("CMYK"), "JPEG"),
        "no-end.jpg": jpeg[:-2],
        "film.gif": encode(draw(), "GIF", save_all=True, append_images=[draw(seed=1)]),
        "photo.avif": encode(draw(), "AVIF"),
        "bits.bmp": encode(draw().convert("1"), "BMP"),
        "grey.pgm": encode(draw().convert("L"), "PPM"),
    }


def test_every_way_in_gives_the_same_pixels(odd_files, clip, bundle, tmp_path):
    preprocessing = bundle.manifest.preprocessing
    assert clip.preprocessing == preprocessing
    (tmp_path / "things").mkdir()
    for name, data in odd_files.items():
        (tmp_path / "things" / name).write_bytes(data)
    training = open_images(FolderSource(kind="folder", path="."), tmp_path, clip.transform())
    trained = {training.name(index).rpartition("/")[2]: training[index][0].numpy() for index in range(len(training))}
    assert trained.keys() == odd_files.keys()
    with Decoders(1, preprocessing, LIMITS, 30) as decoders:
        for name, data in odd_files.items():
            expected = to_pixels(decode(data, LIMITS).image, preprocessing, LIMITS)
            served = decoders.decode(data)
            assert np.array_equal(served.pixels, expected), name
            assert served.notes == decode(data, LIMITS).notes
            assert np.array_equal(trained[name], expected), name


def test_the_saved_page_shows_what_the_model_saw(odd_files):
    for name, data in odd_files.items():
        kind, content = re.fullmatch(r"data:image/(\w+);base64,(.*)", image_url(data)).groups()
        with Image.open(io.BytesIO(base64.b64decode(content))) as shown:
            assert shown.format == kind.upper()
            if kind == "png":
                assert np.array_equal(shown, decode(data, LIMITS).image), name
            else:
                assert base64.b64decode(content) == data


# Where images may be opened without models/images: files that Vitrine itself has written, or only looks at.
OPENERS = {"models/images/decode.py"}


def test_nothing_else_opens_images():
    for top in ("models", "service", "training", "vitrine"):
        for path in (ROOT / top).glob("**/*.py"):
            calls = [
                node
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.Attribute) and ast.unparse(node) in ("Image.open", "ImageFile.Parser")
            ]
            assert bool(calls) == (str(path.relative_to(ROOT)) in OPENERS), path
