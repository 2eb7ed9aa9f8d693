"""What the documents say is there, is there: commands and their options, targets of make, scripts, links, files."""

import ast
import re
import shlex

import pytest
import typer

from common import ROOT
from vitrine.commands import app
from vitrine.models.bundle.bundle import open_bundle
from vitrine.service.operations.settings import DEMO_BUNDLE

OTHERS = (".venv", ".venv-dev", "build")
DOCUMENTS = sorted(path for path in ROOT.glob("**/*.md") if path.relative_to(ROOT).parts[0] not in OTHERS)
SCRIPTS = sorted((ROOT / "loadtests").glob("*.py"))
COMMAND = typer.main.get_command(app)
TOPS = "models|service|training|deploy|loadtests|tests|vitrine"
FILE = re.compile(rf"(?<![\w/.-])(?:{TOPS})/[\w./-]+\.(?:py|toml|sh|js|md|yaml|json|txt)\b")


def named(path):
    return path.relative_to(ROOT).as_posix()


def lines(text):
    """Lines of commands: in fences, indented ones, and what stands in backticks; comments and continuations joined."""
    text = text.replace("\\\n", " ")
    for block in re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        yield from block.splitlines()
    outside = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from (line for line in outside.splitlines() if line.startswith("    "))
    yield from re.findall(r"`([^`\n]+)`", outside)


def calls(text, program):
    """The arguments of every call of a program, as a regular expression has it, that the lines of a text show."""
    for line in (part for whole in lines(text) for part in re.split(r"; | && | \| ", whole)):
        found = re.match(rf"\s*(?:\$ )?(?:[A-Z_]+=\S+ )*{program}(?=\s|$)", line)
        if found is None:
            continue
        words = shlex.split(line[found.end() :].replace("'", "").replace('"', "").replace("…", ""), comments=True)
        for end in (">", "2>", "&"):
            words = words[: words.index(end)] if end in words else words
        yield found, words


def options(words):
    return [word.partition("=")[0].rstrip(",.;:)") for word in words if re.match(r"--[a-z]", word)]


def has_option(command, option):
    return any(option in (*parameter.opts, *parameter.secondary_opts) for parameter in command.params)


@pytest.mark.parametrize("path", [*DOCUMENTS, *SCRIPTS], ids=named)
def test_commands_have_the_options_that_are_shown(path):
    for _, words in calls(path.read_text(), r"(?:\.venv(?:-dev)?/bin/)?vitrine"):
        command, rest = COMMAND, words
        while rest and rest[0] in getattr(command, "commands", {}):
            command, rest = command.commands[rest[0]], rest[1:]
        if command is COMMAND and rest and not rest[0].startswith("-"):
            pytest.fail(f"{named(path)}: there is no `vitrine {rest[0]}`")
        wrong = [option for option in options(rest) if option != "--help" and not has_option(command, option)]
        assert not wrong, f"{named(path)}: `vitrine {' '.join(words)}` has no {', '.join(wrong)}"


def options_of_script(path):
    """--name of every parameter of its functions, and what is written out."""
    text = path.read_text()
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    names = {argument.arg for function in functions for argument in (*function.args.args, *function.args.kwonlyargs)}
    return {f"--{no}{name.replace('_', '-')}" for name in names for no in ("", "no-")} | set(
        re.findall(r"--[a-z][\w-]*", text)
    )


@pytest.mark.parametrize("path", [*DOCUMENTS, *SCRIPTS], ids=named)
def test_scripts_are_there_and_have_the_options_that_are_shown(path):
    for found, words in calls(path.read_text(), r"(?:\S*/)?python3? (?P<script>loadtests/\w+\.py)"):
        script = ROOT / found["script"]
        assert script.exists(), f"{named(path)}: {found['script']}"
        if script != path:  # else it would be held against its own docstring
            wrong = set(options(words)) - options_of_script(script) - {"--help"}
            assert not wrong, f"{named(path)}: {found['script']} has no {', '.join(wrong)}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_make_has_the_targets_that_are_shown(path):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for _, words in calls(path.read_text(), "make"):
        asked = {word for word in words if re.fullmatch(r"[a-z-]+", word)}
        assert asked <= targets, f"{named(path)}: make {asked - targets}"


def anchors(path):
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ +(.+)$", path.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        to = (path.parent / file).resolve() if file else path
        assert to.exists(), f"{named(path)}: {target}"
        if anchor:
            assert anchor in anchors(to), f"{named(path)}: {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_files_that_are_named_are_there(path):
    missing = {file for file in FILE.findall(path.read_text()) if not (ROOT / file).exists()}
    assert not missing, f"{named(path)}: {', '.join(sorted(missing))}"


def test_the_readme_has_the_embedded_bundles_numbers():
    manifest = open_bundle(DEMO_BUNDLE).manifest
    shape, quality, saes = manifest.shape, manifest.cards.quality, manifest.residual
    text = " ".join((ROOT / "README.md").read_text().split())
    features = sum(saes.features)
    for said in (
        f"{shape.layers} layers and {manifest.preprocessing.size[0]} × {manifest.preprocessing.size[1]} pixels",
        f"a CLT of {shape.features:,} features per layer",
        f"{quality.labelled:,} of its {shape.layers * shape.features:,} features have a label",
        f"{quality.auroc_share:.0%} of the labels".replace("%", " %"),
        f"{quality.auroc_share_shuffled:.0%} of shuffled ones".replace("%", " %"),
        f"{manifest.residual_cards.quality.labelled:,} of their {features:,} have a label",
    ):
        assert said in text
