"""`vitrine planted`: a CLIP with a known spurious cue, and how well a repair targets it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vitrine.commands.common import DataRoot, errors_as_messages, help_of, load_clip_of, new_console

planted = typer.Typer(no_args_is_help=True, help="Make a CLIP with a planted cue, and score repairs on it.")


def make(
    recipe: Annotated[Path, typer.Option(help="Recipe (TOML); see training/planted/.")],
    out: Annotated[Path, typer.Option(help="Folder to write; finished parts found there are kept.")],
    seed: Annotated[
        int | None, typer.Option(help="Override the recipe's seed, for other classes, colour and photos.")
    ] = None,
    data_root: DataRoot = Path("data"),
    twin: Annotated[
        bool, typer.Option(help="Also fine-tune the same CLIP without the cue (the twin), to measure repairs against.")
    ] = True,
) -> None:
    """Fine-tune a CLIP so that it confuses a cue with a class; write its data, groups, dictionaries and bundle."""
    from vitrine.commands.export import export
    from vitrine.training.planted.make import make as run
    from vitrine.training.planted.make import measure_twin
    from vitrine.training.planted.recipe import PlantedRecipe
    from vitrine.training.recipes.reading import read_toml

    read, console = read_toml(recipe, PlantedRecipe), new_console()
    if seed is not None:
        read = read.model_copy(update={"data": read.data.model_copy(update={"seed": seed})})
    clip = load_clip_of(read, data_root)
    record = run(read, clip, data_root, out, console)
    if not (out / "bundle").exists():
        saes = out / "saes" if read.residual else None
        export(out / "bundle", checkpoint=out / "clt", residual=saes, data_root=out, calibration_images=64)
    if twin:
        record = measure_twin(read, clip, out, console)
    console.print(f"{record.cue.name} goes with {record.classes[0]}, against {record.classes[1]}", highlight=False)
    for name, accuracy in record.accuracy.items():
        groups = ", ".join(f"{one.label}, {one.group} {one.accuracy.value:.1%}" for one in accuracy.groups)
        worst, average = accuracy.worst, accuracy.average
        console.print(
            f"{name}: worst group {worst.value:.1%} [{worst.low:.1%}, {worst.high:.1%}], average {average.value:.1%}; "
            f"{groups}",
            highlight=False,
            soft_wrap=True,
        )


def score(
    folder: Annotated[Path, typer.Option("--planted", help="Folder that `vitrine planted make` wrote.")],
    proposal: Annotated[
        Path | None,
        typer.Option(help="Interventions as JSON, the most important first; without it the true features are printed."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print which features carry the cue, how a proposal ranks them, and its effect on the groups of unseen images."""
    from vitrine.training.planted.score import Benchmark, read_proposal

    benchmark, console = Benchmark(folder), new_console()
    if proposal is None:
        truths = {name: benchmark.truth(name) for name in benchmark.dictionaries}
        if json:
            print("{" + ", ".join(f'"{name}": {truth.model_dump_json()}' for name, truth in truths.items()) + "}")
            return
        for name, truth in truths.items():
            console.print(f"{name}: the cue moves the logits by {truth.shift:+.2f}; by feature, to first order:")
            for carrier in truth.carriers:
                console.print(
                    f"  layer {carrier.layer} feature {carrier.index}: {carrier.effect:+.3f}", highlight=False
                )
        return
    result = benchmark.score(read_proposal(proposal))
    if json:
        print(result.model_dump_json(indent=1))
        return
    rank = (
        f"the first that carries the cue is number {result.first_rank}" if result.first_rank else "none carries the cue"
    )
    console.print(
        f"{result.interventions} changes: {rank}; {result.found} of the first ten carry it (by chance "
        f"{result.expected:.2f})",
        highlight=False,
    )
    for what, was, now, changed in (
        ("worst group", result.before.worst, result.after.worst, result.change.worst),
        ("average", result.before.average, result.after.average, result.change.average),
    ):
        interval = f"[{changed.low:+.1%}, {changed.high:+.1%}]"
        console.print(f"{what}: {was.value:.1%} -> {now.value:.1%}, {changed.value:+.1%} {interval}", highlight=False)
    if result.closed is not None:
        console.print(f"share of the gap to the unplanted twin that is closed: {result.closed:.0%}", highlight=False)


planted.command(
    help=help_of(make),
    epilog="Example: vitrine planted make --recipe training/planted/planted-demo.toml --seed 1 --data-root data "
    "--out planted/seed-1",
)(errors_as_messages(make))
planted.command(
    help=help_of(score), epilog="Example: vitrine planted score --planted planted/seed-1 --proposal edit.json"
)(errors_as_messages(score))
