"""Members of tars: as the library reads them where they are sound, and damage never taken for the end."""

import gzip
import io
import lzma
import tarfile
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from making import JPEG, member, tar_bytes

from vitrine.models.inputs.streams import ShardError, open_stream
from vitrine.models.inputs.tar import Tar, Type

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
NAMES = st.text(st.sampled_from("aé/. 字-_"), min_size=1, max_size=40).filter(lambda name: not name.endswith("/"))
LONG = st.integers(90, 300).map(lambda length: ("folder/" * 50)[:length].rstrip("/") + "/a.jpg")


def read(path):
    """([(name, type, size, content)], whether the end blocks are there)."""
    stream = open_stream(path)
    try:
        tar = Tar(stream)
        found = [(m.name, m.type, m.size, stream.read(m.size)) for m in tar]
    finally:
        stream.close()
    return found, tar.ended


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("tars") / "x.tar"


@given(
    st.lists(
        st.tuples(
            st.lists(st.tuples(NAMES | LONG, st.binary(max_size=1100)), max_size=4),
            st.sampled_from(FORMATS[1:]),
        ),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from(["", "gz", "bz2", "xz"]),
)
@settings(max_examples=60, deadline=None)
def test_members_are_the_librarys_also_of_tars_one_after_the_other(place, tars, compression):
    expected, whole = [], b""
    for members, format in tars:
        content = tar_bytes(*members, format=format)
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            expected += [(m.name, Type.FILE, m.size, tar.extractfile(m).read()) for m in tar]
        whole += compress(content, compression)
    place.write_bytes(whole)
    assert read(place) == (expected, True)


def compress(content, kind):
    if not kind:
        return content
    module = __import__({"gz": "gzip", "bz2": "bz2", "xz": "lzma"}[kind])
    return module.compress(content)


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_no_file_is_told_by_its_type(place, format):
    kinds = [
        ("folder/", tarfile.DIRTYPE, Type.FOLDER),
        ("hard", tarfile.LNKTYPE, Type.HARD_LINK),
        ("symbolic", tarfile.SYMTYPE, Type.SYMBOLIC_LINK),
        ("pipe", tarfile.FIFOTYPE, Type.OTHER),
    ]
    place.write_bytes(
        tar_bytes(
            *(member(name, type=kind, linkname="a.jpg") for name, kind, _ in kinds), ("a.jpg", JPEG), format=format
        )
    )
    found, _ = read(place)
    assert [(name, kind) for name, kind, *_ in found] == [(name, kind) for name, _, kind in kinds] + [
        ("a.jpg", Type.FILE)
    ]


SOUND = tar_bytes(("1.jpg", JPEG * 60), ("2.jpg", b"x" * 512), ("3.jpg", JPEG), format=tarfile.PAX_FORMAT)
HEADERS, END = (0, 1536, 2560), 3584


@pytest.mark.parametrize("at", HEADERS)
def test_a_damaged_header_is_an_error_that_names_its_byte(place, at):
    """By one other bit, or set to zero: never the end, nor passed over."""
    flipped = bytearray(SOUND)
    flipped[at + 3] ^= 4
    zeroed = bytearray(SOUND)
    zeroed[at : at + 512] = bytes(512)
    for damaged in (flipped, zeroed):
        place.write_bytes(damaged)
        with pytest.raises(ShardError, match=r"not a tar file|damaged: at byte [\d,]+ there is neither"):
            read(place)
    if at == HEADERS[1]:
        with pytest.raises(ShardError, match=r"at byte 2,048 .*, but something else after zeros"):
            read(place)


def test_a_tar_that_is_cut_short_is_an_error_or_lacks_its_end(place):
    (whole, _), messages = read_of(place, SOUND), set()
    data_end = (512 + len(JPEG * 60), 2048 + 512, 3072 + len(JPEG))
    for size in range(0, 5000, 13):
        try:
            found, ended = read_of(place, SOUND[:size])
        except ShardError as error:
            messages.add(str(error).split(" the")[0])
            continue
        assert found == whole[: sum(end <= size for end in data_end)], size
        assert ended == (size > END), size
    assert messages == {"it is empty", "it is cut short:", "it is cut short in"}


def read_of(place, content):
    place.write_bytes(content)
    return read(place)


@pytest.mark.parametrize("missing", [0, 1, 100, 512 - len(JPEG)])
def test_what_fills_up_the_last_block_may_be_missing(place, missing):
    place.write_bytes(SOUND[: END - missing])
    found, ended = read(place)
    assert (len(found), ended) == (3, False)


def header(**fields):
    block = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    for at, value in fields.values():
        block[at : at + len(value)] = value
    block[148:156] = b"        "
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (header(size=(124, b"\xff" * 12)), "no valid size"),
        (header(size=(124, b"-0000000001\0")), "no valid size"),
        (header(size=(124, b"\x80" + b"\xff" * 11)), "cut short in the member that begins at byte 0"),
        (header(size=(124, b"77777777777\0"), kind=(156, b"x")), "extended header at byte 0 would have 8,589,934,591"),
        (header(size=(124, b"00000000011\0"), kind=(156, b"x")) + b"99999 a=b".ljust(512, b"\0"), "is not a valid one"),
        (header(kind=(156, b"L")), "cut short after an extended header"),
        (header(kind=(156, b"S"), more=(482, b"\1")), "cut short in the member"),
    ],
)
def test_headers_that_lie_are_errors_and_cost_nothing(place, block, message):
    place.write_bytes(block)
    with pytest.raises(ShardError, match=message):
        read(place)


def test_sums_of_signed_bytes_are_taken_too(place):
    block = bytearray(tarfile.TarInfo("é.jpg").tobuf(tarfile.GNU_FORMAT))
    high = sum(byte > 127 for byte in block)
    block[148:156] = b"%06o\0 " % (int(bytes(block[148:154]), 8) - 256 * high)
    place.write_bytes(bytes(block) + bytes(1024))
    assert read(place)[0][0][0] == "é.jpg"


def test_names_are_any_bytes(place):
    place.write_bytes(tar_bytes(("a\udcff.jpg", JPEG)))
    assert read(place)[0][0][0] == "a\udcff.jpg"


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_compressed_streams_that_are_damaged(place, kind):
    whole = compress(SOUND, kind)
    place.write_bytes(whole + bytes(600))  # filled up
    assert len(read(place)[0]) == 3
    place.write_bytes(whole[:-9])
    with pytest.raises(ShardError, match=r"cut short: its .* stream has no end"):
        read(place)
    place.write_bytes(whole[: len(whole) // 2] + bytes(30) + whole[len(whole) // 2 :])
    with pytest.raises(ShardError, match=r"cannot be decompressed|no end|damaged|not a tar"):
        read(place)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"\x28\xb5\x2f\xfd", "compressed by zstd, which is not supported"),
        (b"PK\x03\x04", "a zip archive, which is not supported"),
        (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
        (b"Rar!\x1a\x07", "a rar archive"),
    ],
)
def test_other_archives_are_refused_by_name(place, start, message):
    place.write_bytes(start.ljust(2000, b"x"))
    with pytest.raises(ShardError, match=message):
        read(place)


def test_many_zeros_are_decompressed_in_pieces(place):
    """A member of a gigabyte of zeros is gone past."""
    info, _ = member("a.bin")
    info.size = 2**26
    content = gzip.compress(info.tobuf(tarfile.GNU_FORMAT)) + gzip.compress(bytes(2**26)) + gzip.compress(bytes(1024))
    place.write_bytes(content)
    stream = open_stream(place)
    assert [m.size for m in Tar(stream)] == [2**26]
    stream.close()


def test_the_end_that_is_missing_is_that_of_the_last_of_several_tars(place):
    assert [read_of(place, SOUND + more)[1] for more in (SOUND, SOUND[:END])] == [True, False]


def test_the_size_of_a_hard_link_is_that_of_its_target(place):
    """Some programs write it; no data are behind it."""
    place.write_bytes(header(size=(124, b"00000007777\0"), kind=(156, b"1")) + SOUND)
    assert [size for _, _, size, _ in read(place)[0]] == [0, len(JPEG * 60), 512, len(JPEG)]


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
@pytest.mark.parametrize("at", [1, 30, -12])
def test_a_later_stream_that_is_damaged_is_never_the_end(place, kind, at):
    second = bytearray(compress(SOUND, kind))
    second[at] ^= 0x55
    place.write_bytes(compress(SOUND, kind) + second)
    with pytest.raises(ShardError, match=r"stream cannot be decompressed|damaged"):
        read(place)


def test_memory_that_xz_asks_for_is_limited(place):
    """A dictionary of a gigabyte, as a header says."""
    content = bytearray(lzma.compress(SOUND))
    block, end = 12, 12 + 4 * (content[12] + 1)
    content[block + 4] = 36
    content[end - 4 : end] = zlib.crc32(content[block : end - 4]).to_bytes(4, "little")
    place.write_bytes(content)
    with pytest.raises(ShardError, match=r"cannot be decompressed \(Memory usage limit exceeded"):
        read(place)
