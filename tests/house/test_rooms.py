"""Imports run one way, between rooms and between modules, and no file outgrows a room."""

import ast
from graphlib import TopologicalSorter

import pytest

from common import ROOT

# Each line may import from the lines above it, and rooms of one line not from one another.
FLOORS = {
    "models": (
        ("bootstrap", "errors", "progress", "stopping", "tables"),
        ("files", "groups", "images", "texts"),
        ("inputs",),
        ("account", "bundle"),
        ("hub", "interventions"),
        ("precision",),
        ("clip",),
        ("dictionary",),
        ("graph",),
        ("export",),
    ),
    "training": (
        ("recipes",),
        ("checkpoint", "data"),
        ("evaluation",),
        ("cards", "export", "report", "run"),
        ("pretraining",),
        ("planted",),
    ),
    "service": (
        ("errors", "page_files", "processes"),
        ("operations", "schemas"),
        ("engine",),
        ("answers",),
        ("exports", "http", "offline"),
        ("app", "library"),
    ),
}
TABLES = {"training/recipes/costs.py"}  # may be longer: mostly data
LONGEST = 350  # lines


def modules():
    """(dotted name below `vitrine.`, path) of every module of the product."""
    for top in (*FLOORS, "vitrine"):
        for path in sorted((ROOT / top).glob("**/*.py")):  # links are not followed
            if "examples" in path.parts:  # programs for users to copy
                continue
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            yield name.removeprefix("vitrine.") if top == "vitrine" else name, path


MODULES = dict(modules())


def imports(path):
    """Modules of ours that a file imports, at its top or later."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in (name.removeprefix("vitrine.") for name in names if name.startswith("vitrine.")):
            yield name if name in MODULES else name.rpartition(".")[0]


def external(path):
    """What else it imports, at its top."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


IMPORTS = {name: set(imports(path)) for name, path in MODULES.items()}


def room(module):
    return ".".join(module.split(".")[:2])


def test_all_that_is_imported_is_there():
    assert set().union(*IMPORTS.values()) <= MODULES.keys()


@pytest.mark.parametrize("top", FLOORS)
def test_every_room_has_a_floor(top):
    listed = [name for floor in FLOORS[top] for name in floor]
    assert sorted(listed) == sorted({name.split(".")[1] for name in MODULES if name.startswith(f"{top}.")})


@pytest.mark.parametrize("top", FLOORS)
def test_rooms_import_from_the_floors_below(top):
    below = {top, *(() if top == "models" else (f"models.{name}" for floor in FLOORS["models"] for name in floor))}
    for floor in FLOORS[top]:
        for name in floor:
            own = f"{top}.{name}"
            for module in (module for module in MODULES if room(module) == own):
                wrong = {target for target in IMPORTS[module] if room(target) not in {own, *below}}
                assert not wrong, f"{module} imports {', '.join(sorted(wrong))}"
        below |= {f"{top}.{name}" for name in floor}


def test_nobody_imports_the_command():
    for module, targets in IMPORTS.items():
        if not module.startswith(("commands", "__main__", "vitrine")):
            assert not [target for target in targets if target.startswith("commands")], module


def test_no_circle_of_imports():
    order = list(TopologicalSorter(IMPORTS).static_order())  # raises CycleError, which names the circle
    assert len(order) >= len(MODULES)


@pytest.mark.parametrize(
    "room_without_torch",
    [
        "models.account",
        "models.bundle",
        "models.files",
        "models.hub",
        "models.images",
        "models.inputs",
        "models.precision",
        "models.texts",
        "service",
        "commands",
    ],
)
def test_what_the_service_imports_needs_no_torch(room_without_torch):
    """Neither itself nor by what it imports; commands import what they need when they run."""
    reached, waiting = set(), [name for name in MODULES if name.startswith(room_without_torch)]
    if room_without_torch == "commands":
        waiting = ["commands.serve", "commands.bulk", "commands.attribute", "commands.doctor", "commands.replay"]
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += [] if module == "commands.common" else IMPORTS[module]
    for module in reached:
        names = {name.split(".")[0] for name in external(MODULES[module])}
        assert not names & {"torch", "open_clip", "torchvision", "onnx", "safetensors"}, module


@pytest.mark.parametrize("path", sorted(MODULES.values()), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_outgrows_a_room(path):
    name = path.relative_to(ROOT).as_posix()
    if name not in TABLES and not name.startswith("service/schemas/"):
        assert len(path.read_text().splitlines()) <= LONGEST


def test_packages_have_a_docstring_and_a_sentence():
    for path in MODULES.values():
        if path.name == "__init__.py":
            text = ast.get_docstring(ast.parse(path.read_text()))
            assert text, path
            assert text.split("\n\n")[0].endswith("."), path


def test_the_readme_shows_every_room():
    text = (ROOT / "README.md").read_text()
    table = text[text.index("## The house") : text.index("### Words")]
    for top in FLOORS:
        for folder in {path.parent for path in MODULES.values() if path.parent.parent == ROOT / top}:
            assert f"`{folder.name}/`" in table, folder


def test_the_readme_has_at_most_25_terms():
    text = (ROOT / "README.md").read_text()
    words = text[text.index("### Words") : text.index("## How far to trust")]
    assert 10 < len([line for line in words.splitlines() if line.startswith("| ")]) - 1 <= 25
