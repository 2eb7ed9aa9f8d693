"""What the operating system refuses to a command: one sentence, exit code 1, no traceback."""

import os
import resource
import subprocess
import sys
from contextlib import contextmanager

import pytest
from PIL import Image
from typer.testing import CliRunner

from common import ROOT
from faults import everything
from vitrine.commands import app

LIGHT = os.environ.get("VITRINE_LIGHT_PYTHON", sys.executable)
UNREADABLE = os.fsdecode(b"a\xff")  # a name that is not UTF-8


@pytest.fixture
def words(bundle_path, carded, checkpoint, data_root, recipe_path, tmp_path):
    """words(command, out) -> the command's words that write to `out`, quickly refused."""
    photos, data = tmp_path / "photos", ["--data-root", data_root]
    photos.mkdir()
    Image.linear_gradient("L").convert("RGB").save(photos / "0.png")
    trained = ["--checkpoint", checkpoint, *data]

    def words(command, out):
        name, _, option = command.partition(" ")
        option = option or "--out"
        rest = {
            "attribute": [photos / "0.png", "--bundle", carded.path],
            "bulk": [photos, "--bundle", bundle_path],
            "replay": [photos, "--bundle", bundle_path],
            "train": ["--recipe", recipe_path, *data],
            "evaluate": [*trained, "--images", 4, "--workers", 0],
            "export": [*trained],
            "cards": [*trained, "--bundle", bundle_path, "--workers", 0],
        }[name]
        return [str(word) for word in (name, *rest, option, out)]

    return words


WRITERS = ["attribute --svg", "attribute --html", "attribute --graph", "bulk", "replay --json"]
WRITERS += ["train", "evaluate", "export", "cards"]


REASONS = ("Not a directory", "File exists", "not UTF-8", "File name too long")


@pytest.mark.parametrize("command", WRITERS)
@pytest.mark.parametrize("place", ["file/out", UNREADABLE, "n" * 300])
def test_outputs_that_cannot_be(words, tmp_path, command, place):
    if command == "attribute --graph":
        place = place.replace(UNREADABLE, f"{UNREADABLE}/x") + ".json"
    (tmp_path / "file").write_text("a file, no folder")
    result = CliRunner().invoke(app, words(command, tmp_path / place))
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == 1
    (message,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert str(tmp_path) in message
    assert any(reason in message for reason in REASONS)
    assert everything(tmp_path).keys() == {"file", "photos/0.png"}


@pytest.fixture
def no_room():
    """`with no_room():` no file becomes longer than 512 bytes, as where a quota or a disk ends."""

    @contextmanager
    def limited():
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


@pytest.mark.parametrize("command", [name for name in WRITERS if name.split()[0] in ("attribute", "bulk", "replay")])
def test_no_room_for_outputs(words, no_room, tmp_path, command):
    out = tmp_path / ("out.json" if command in ("attribute --graph", "replay --json") else "out")
    with no_room():
        result = CliRunner().invoke(app, words(command, out))
    assert isinstance(result.exception, SystemExit), result.output
    assert result.exit_code == 1
    (message,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert str(tmp_path) in message
    assert "File too large; the file system, or `ulimit -f`, allows no larger files" in message
    assert not out.is_file()  # nothing that is half written


@pytest.mark.parametrize("command", [["verify"], ["serve", "--bundle"], ["doctor", "--bundle"]])
def test_a_bundle_whose_name_is_no_utf_8(tmp_path, bundle_path, command):
    (tmp_path / UNREADABLE).symlink_to(bundle_path)  # where it leads is what counts
    if command == ["verify"]:
        assert CliRunner().invoke(app, [*command, str(tmp_path / UNREADABLE)]).exit_code == 0
    (tmp_path / UNREADABLE).unlink()
    (tmp_path / UNREADABLE).mkdir()
    (tmp_path / "link").symlink_to(UNREADABLE)
    for name in (UNREADABLE, "link"):
        result = CliRunner().invoke(app, [*command, str(tmp_path / name)])
        assert result.exit_code == 1
        assert result.stderr == f"error: {tmp_path}/a\\xff has a name that is not UTF-8; rename it, or choose another\n"


FULL = (
    "error: standard output: No space left on device; free some space there and start again, or write to another "
    "place\n"
)


@pytest.mark.parametrize("words", ["verify {bundle}", "--help", "bulk --help", "serve --bundle {bundle}"])
@pytest.mark.parametrize("output", ["full", "unread", "closed"])
def test_standard_output(bundle_path, words, output):
    """On a full disk it is a sentence; who reads no further is told nothing; `>&-` wants nothing printed."""
    if output == "closed" and words.startswith("serve"):
        pytest.skip("it would serve")
    command = [LIGHT, "-m", "vitrine", *words.format(bundle=bundle_path).split()]
    redirected = {"full": '"$@" >/dev/full', "unread": '"$@"', "closed": '"$@" >&-'}[output]
    read, write = os.pipe()
    os.close(read)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    ended = subprocess.run(
        ["sh", "-c", redirected, "sh", *command], stdout=write, stderr=subprocess.PIPE, text=True, env=environment
    )
    os.close(write)
    assert ended.stderr == (FULL if output == "full" else "")
    assert ended.returncode == (0 if output == "closed" else 1)


def test_nobody_to_tell():
    """Neither of the standard streams can be written; a file that is opened does not stand in for a closed one."""
    code = "import os, sys; from vitrine.commands.streams import prepare_streams; prepare_streams()\n"
    code += "file = open('/dev/null', 'w'); assert file.fileno() > 2, file\n"
    code += "print('out'); print('err', file=sys.stderr); os.write(1, b'raw'); os.write(2, b'raw')"
    script = '"$1" -c "$2" <&- >&- 2>&- && "$1" -m vitrine verify nix >/dev/full 2>/dev/full'
    assert subprocess.run(["sh", "-c", script, "sh", LIGHT, code], cwd=ROOT).returncode == 1
