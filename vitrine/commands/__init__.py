"""The `vitrine` command. Every subcommand imports what it needs when it runs: serving never loads torch."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from vitrine.commands.attribute import attribute
from vitrine.commands.bulk import bulk
from vitrine.commands.cards import cards
from vitrine.commands.circuit import circuit
from vitrine.commands.common import errors_as_messages, help_of
from vitrine.commands.debias import debias
from vitrine.commands.doctor import doctor
from vitrine.commands.edit import create, list_edits, show
from vitrine.commands.edit import verify as verify_edits
from vitrine.commands.evaluate import evaluate
from vitrine.commands.export import export
from vitrine.commands.intervene import intervene
from vitrine.commands.planted import planted
from vitrine.commands.pretrain import pretrain
from vitrine.commands.pull import pull
from vitrine.commands.push import push
from vitrine.commands.recipes import recipes
from vitrine.commands.replay import replay
from vitrine.commands.serve import serve
from vitrine.commands.streams import prepare_streams
from vitrine.commands.train import train
from vitrine.commands.verify import verify
from vitrine.models.stopping import signals_raise

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="CLIP predictions with an exact account of what made them: train, evaluate, export, verify, serve, attribute.",
)


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        typer.echo(f"vitrine {version('vitrine')}")
    except PackageNotFoundError:
        typer.echo("vitrine (a checkout, not installed)")
    raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


EXAMPLES: dict[Callable[..., None], str] = {
    pretrain: "vitrine pretrain --recipe training/recipes/clip/demo.toml --data-root data --out data/demo-clip",
    train: "vitrine train --recipe demo --data-root data --out runs/demo",
    evaluate: "vitrine evaluate --checkpoint runs/demo --data-root data --baseline runs/per-layer",
    recipes: "vitrine recipes b32-cifar100-relu_topk",
    export: "vitrine export --checkpoint runs/demo --data-root data --out bundles/demo; "
    "vitrine export --clip ViT-B-32 --weights openai --out bundles/b32; "
    "vitrine export --bundle bundles/demo --residual runs/demo-residual --data-root data --out bundles/demo-residual",
    cards: "vitrine cards --checkpoint runs/b32 --bundle bundles/b32 --out bundles/b32-cards; "
    "vitrine cards --checkpoint runs/b32-sae --bundle bundles/b32-cards --out bundles/b32-all",
    verify: "vitrine verify models/demo",
    pull: "vitrine pull hf-hub:org/name --out bundles/name",
    push: "vitrine push bundles/b32 --out repositories/b32; vitrine push bundles/b32 --to hf-hub:org/b32",
    serve: "vitrine serve --bundle models/demo --port 3000",
    doctor: "vitrine doctor --bundle bundles/b32",
    replay: "vitrine replay photos --bundle models/demo --images 200",
    bulk: "vitrine bulk photos --out answers --labels-file names.txt --sources 10",
    attribute: "vitrine attribute photo.jpg --labels cat,dog,truck --contrast dog --sources",
    circuit: "vitrine circuit photo.jpg --label cat --html cat.html; vitrine circuit photos/cat --images 50; "
    "vitrine circuit photo.jpg --dictionary residual",
    intervene: "vitrine intervene photo.jpg --edit 'ablate 7/123'; vitrine intervene photo.jpg --counterfactual dog",
    debias: "vitrine debias --data waterbirds --groups waterbirds/metadata.csv --labels landbird,waterbird "
    "--out no-water.json; vitrine debias --data photos --cue 'a red background' --out no-red.json",
}
EDIT_EXAMPLES: dict[str, tuple[Callable[..., None], str]] = {
    "create": (
        create,
        'vitrine edit create no-snow --description \'snow is not a husky\' --edit \'{"op": "ablate", "layer": 9, '
        '"index": 120}\' --images photos --out edits',
    ),
    "show": (show, "vitrine edit show no-snow --edits edits"),
    "list": (list_edits, "vitrine edit list --bundle bundles/b32 --edits edits"),
    "verify": (verify_edits, "vitrine edit verify edits/no-snow.json --key-file key --bundle bundles/b32"),
}
for command, example in EXAMPLES.items():
    app.command(help=help_of(command), epilog=f"Example: {example}")(errors_as_messages(command))
edit = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Make, list and check edits: interventions that are kept in a file and served by name.",
)
for name, (command, example) in EDIT_EXAMPLES.items():
    edit.command(name, help=help_of(command), epilog=f"Example: {example}")(errors_as_messages(command))
app.add_typer(edit, name="edit")
app.add_typer(planted, name="planted")


def main() -> None:
    """The command as a program: as `app`, with standard streams of its own."""
    prepare_streams()
    with signals_raise():
        errors_as_messages(app)(prog_name="vitrine")  # help and wrong use are printed, too
