"""What the tests of inputs are made of: small images, tars of any dialect, readings of a whole source."""

import io
import tarfile
from contextlib import closing

JPEG = b"\xff\xd8\xff\xe0 a picture"
PNG = b"\x89PNG\r\n\x1a\n a picture"


def member(name, content=b"", **fields):
    """(TarInfo, content) of a member; fields: of its header, as `type` and `linkname`."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def tar_bytes(*members, format=tarfile.GNU_FORMAT, mode="w"):
    """A tar of `member`s, or of (name, content)."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode, format=format) as tar:
        for info, content in members:
            if isinstance(info, str):
                info, content = member(info, content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def names_and_contents(source, start=0, stop=None):
    """[(name, content, or the error where it cannot be read)] of a source."""
    found = []
    with closing(source.reader()) as reader:
        for item in reader.items(start, len(source) if stop is None else stop):
            try:
                found.append((item.name, item.read()))
            except OSError as error:
                found.append((item.name, error))
    return found
