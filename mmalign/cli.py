"""Command line of mmalign."""

from __future__ import annotations

import io
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from mmalign.commands._group import Commands, print_error, shows_tracebacks
from mmalign.console import error_message

if TYPE_CHECKING:
    from mmalign.config import Recipe


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    help="Align text-to-image and vision-language models with human preferences.",
)


Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="The same as KEY=VALUE after the recipe; repeatable."),
]
Values = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Values that override the recipe's, e.g. train.lr=1e-5."),
]


RecipeName = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE", help="YAML file, name of a bundled recipe, or a run's folder; see `mmalign list`."
    ),
]
CheckpointName = Annotated[
    str | None,
    typer.Option(
        metavar="best|N", help="Checkpoint of the run, by score or updates.", show_default="the end of the run"
    ),
]


console = Console(highlight=False, soft_wrap=True, markup=False)  # a path may hold brackets


def _print_version(is_asked: bool) -> None:
    if is_asked:
        console.print(f"mmalign {metadata.version('mmalign')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Align text-to-image and vision-language models with human preferences."""


@app.command(epilog="For example: mmalign quickstart vision_language --seed 1")
def quickstart(
    modality: Annotated[
        str, typer.Argument(metavar="[MODALITY]", help="text_to_image or vision_language.", show_default=True)
    ] = "text_to_image",
    seed: Annotated[int, typer.Option(help="Seed of the training.")] = 0,
    generate: Annotated[
        bool, typer.Option("--generate", help="Generate new preference pairs instead of using the bundled ones.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for all outputs.", show_default="the recipe's")] = None,
) -> None:
    """Align a bundled model on this machine, without a network, and show the proof: some minutes on two cores."""

    from mmalign.commands.quickstart import quickstart as run

    run(modality, seed=seed, generate=generate, output=output)


@app.command(epilog="For example: mmalign init Qwen/Qwen2.5-VL-7B-Instruct my-pairs.json --memory 24")
def init(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id of the model.")],
    data: Annotated[str, typer.Argument(metavar="DATA", help="File, folder, glob or Hub id of preference data.")],
    values: Values = None,
    method: Annotated[
        str | None, typer.Option(help="Method, see `mmalign list`.", show_default="by model and data")
    ] = None,
    output: Annotated[Path, typer.Option(metavar="FILE", help="Recipe to write.")] = Path("recipe.yaml"),
    memory: Annotated[
        float | None, typer.Option(metavar="GIB", help="Memory of the card.", show_default="this machine's")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    overrides: Overrides = None,
) -> None:
    """Write a recipe for a model and preference data, with the published settings of its family."""
    from mmalign.commands.init import init as run

    run(
        model,
        data,
        [*(overrides or ()), *(values or ())],
        method=method,
        output=output,
        memory=memory,
        overwrite=overwrite,
    )


@app.command(epilog="For example: mmalign train diffusion_dpo_sdxl_lora data.path=my-pairs --dry-run")
def train(
    recipe: RecipeName,
    values: Values = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything before the first update, show the plan, write nothing.")
    ] = False,
    overrides: Overrides = None,
) -> None:
    """Train by a recipe; the same command again goes on where it stopped."""
    checked = _load(recipe, values, overrides)  # before torch is imported
    from mmalign.commands.train import train as run

    if dry_run:
        run(checked, dry_run=True)
    else:
        run(checked)


@app.command(epilog="For example: mmalign show diffusion_dpo_sdxl_lora data.path=my-pairs")
def show(
    recipe: RecipeName,
    values: Values = None,
    number: Annotated[int, typer.Option(min=0, help="Number of examples.")] = 5,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with pictures to this file.")] = None,
    overrides: Overrides = None,
) -> None:
    """Show what a recipe will train on: counts, what is dropped and why, lengths and sizes, and the first examples."""
    checked = _load(recipe, values, overrides)  # before torch is imported
    from mmalign.commands.show import show as run

    run(checked, number=number, html=html)


@app.command(epilog="For example: mmalign cache diffusion_dpo_sdxl_lora")
def cache(recipe: RecipeName, values: Values = None, overrides: Overrides = None) -> None:
    """Store what a recipe's training would work out again and again; the same command again goes on where it stopped.

    Several processes share the work: accelerate launch -m mmalign cache RECIPE. `mmalign train` does what is left.
    """

    checked = _load(recipe, values, overrides)  # before torch is imported
    from mmalign.commands.cache import cache as run

    run(checked)


@app.command(epilog="For example: mmalign evaluate diffusion_dpo_sdxl_lora --checkpoint best")
def evaluate(
    recipe: RecipeName, values: Values = None, checkpoint: CheckpointName = None, overrides: Overrides = None
) -> None:
    """Compare the base model with the trained one on the same prompts or questions, with 95 % intervals."""
    checked = _load(recipe, values, overrides)  # before torch is imported
    from mmalign.commands.evaluate import evaluate as run

    run(checked, checkpoint=checkpoint)


@app.command(epilog="For example: mmalign gallery diffusion_dpo_sdxl_lora")
def gallery(
    recipe: RecipeName, values: Values = None, checkpoint: CheckpointName = None, overrides: Overrides = None
) -> None:
    """Make the before-and-after page, of what was evaluated."""
    checked = _load(recipe, values, overrides)  # before torch is imported
    from mmalign.commands.gallery import gallery as run

    run(checked, checkpoint=checkpoint)


@app.command(epilog="For example: mmalign export diffusion_dpo_sdxl_lora --to comfyui")
def export(
    recipe: RecipeName,
    values: Values = None,
    to: Annotated[
        Literal["diffusers", "peft", "kohya", "comfyui", "merged"],
        typer.Option(help="Form of the files; merged is a whole model."),
    ] = ...,  # type: ignore[assignment]  # typer's mark of a required option
    checkpoint: CheckpointName = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder to write.", show_default="export/FORM in the run's")
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"] | None,
        typer.Option(help="Precision of the weights.", show_default="the base model's, float32 for adapters"),
    ] = None,
    push: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Upload to this repository of the Hub.", show_default=False)
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Write a trained model in the form of another program, read it back and compare it; with a model card."""
    checked = _load(recipe, values, overrides)  # before torch is imported
    from mmalign.commands.export import export as run

    run(checked, to=to, checkpoint=checkpoint, output=output, dtype=dtype, push=push)


@app.command(epilog="For example: mmalign compare diffusion_dpo_sd15_lora mapo_sd15_lora --seeds 3")
def compare(
    recipes: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE", help="YAML files or names of bundled recipes, and KEY=VALUE."),
    ],
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each recipe, with seeds 0, 1, ...")] = 3,
    output: Annotated[Path, typer.Option(help="Folder for all outputs.")] = Path("runs/compare"),
    pairs: Annotated[
        list[int] | None,
        typer.Option(min=1, metavar="N", help="Also evaluate each run after N pairs; repeatable."),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also write the table to this Markdown file, with its numbers and charts beside it."
        ),
    ] = None,
    overrides: Overrides = None,
) -> None:
    """Train recipes with several seeds, measure them alike, and write one table; what is done is not done again."""

    from mmalign.commands.compare import compare as run

    # Assignments may stand among the recipes
    run(
        [name for name in recipes if "=" not in name],
        seeds=seeds,
        output=output,
        pairs=pairs or (),
        overrides=[*(overrides or ()), *(value for value in recipes if "=" in value)],
        table=table,
    )


@app.command(epilog="For example: mmalign prepare bdhs_llava16")
def prepare(recipe: RecipeName, values: Values = None, overrides: Overrides = None) -> None:
    """Make the pairs that a recipe learns from, and write them to data.path."""
    checked = _load(recipe, values, overrides)  # before torch is imported
    from mmalign.commands.prepare import prepare as run

    run(checked)


@app.command(epilog="For example: mmalign doctor diffusion_dpo_sdxl_lora --html report.html")
def doctor(
    sources: Annotated[
        list[str], typer.Argument(metavar="RECIPE|FILES", help="A recipe and KEY=VALUE, or files of preference pairs.")
    ],
    format: Annotated[
        str | None, typer.Option(help="data.format of the files.", show_default="guessed from their columns")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder of the images of response files.", show_default=False)
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(metavar="CHECK", help="Leave out a check by its name; repeatable.")
    ] = None,
    fail_on: Annotated[
        Literal["error", "warning", "none"], typer.Option(help="Lowest level of findings that gives exit code 1.")
    ] = "warning",
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write all findings to this file.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with pictures to this file.")] = None,
    overrides: Overrides = None,
) -> None:
    """Find defects of preference data: unreadable images, contradictions, shared images, length bias, and others.

    Exit code: 0 if nothing was found, 1 for findings of the level --fail-on, 2 if files cannot be read or written.
    """
    from mmalign.atomic_io import CheckpointError
    from mmalign.commands.doctor import doctor as run

    # Exit code 1 is for findings, so that an error has another one
    try:
        code = run(
            sources,
            overrides=overrides or (),
            format=format,
            images=images,
            ignore=ignore or (),
            fail_on=fail_on,
            json=json,
            html=html,
        )
    except (ValueError, OSError, CheckpointError) as error:
        if shows_tracebacks():
            raise
        print_error(f"error: {error_message(error)}")
        raise SystemExit(2) from None
    raise typer.Exit(code or 0)


@app.command(epilog="For example: mmalign bench diffusion_dpo_sdxl_lora --variant train.compile=true")
def bench(
    recipe: RecipeName,
    values: Values = None,
    variant: Annotated[
        list[str] | None,
        typer.Option(metavar="'KEY=VALUE ...'", help="Also measure a variant with these overrides; repeatable."),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Measurements of each run.")] = 5,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the numbers to this file.")] = None,
    overrides: Overrides = None,
) -> None:
    """Measure a training step: pairs per second, its parts, operations, and memory.

    In a checkout, python -m tests.benchmarks.against and python -m tests.benchmarks.scale measure it beside other
    programs, on models of random weights, and as batches, images or prompts grow.
    """
    from mmalign.commands.bench import bench as run

    run(
        recipe,
        overrides=[*(overrides or ()), *(values or ())],
        variants=variant or (),
        repeats=repeats,
        json=json,
    )


@app.command(epilog="For example: mmalign plan diffusion_dpo_sdxl_lora --memory 24")
def plan(
    recipe: RecipeName,
    values: Values = None,
    memory: Annotated[
        float | None, typer.Option(metavar="GIB", help="Memory of the card.", show_default="this machine's GPU")
    ] = None,
    probe: Annotated[bool, typer.Option("--probe", help="Also make two updates here and measure their peak.")] = False,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the numbers to this file.")] = None,
    overrides: Overrides = None,
) -> None:
    """Predict a training's memory, disk and epochs from configurations alone, before a download.

    If the card is too small, the last lines say what to switch on, in order.
    """
    checked = _load(recipe, values, overrides)  # before torch is imported
    from mmalign.commands.plan import plan as run

    run(checked, memory=memory, probe=probe, json=json)


@app.command(epilog="For example: mmalign explain train.lr")
def explain(
    key: Annotated[str | None, typer.Argument(metavar="[KEY]", help="Such as train, train.lr or lr.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the page of all keys.")] = False,
) -> None:
    """Explain a key of recipes: its meaning, type, default and limits."""
    from mmalign.commands import explain as command

    if markdown:
        print(command.markdown(), end="")
        return
    for line in command.explain(key):
        console.print(line)


@app.command("list", epilog="For example: mmalign list")
def list_() -> None:
    """List methods, losses, data layouts, model families, reward models and bundled recipes."""
    from mmalign.commands.list import list_everything

    list_everything(console)


def _load(name: str, values: list[str] | None, overrides: list[str] | None) -> Recipe:
    from mmalign.commands.load_recipe import load_recipe

    return load_recipe(name, [*(overrides or ()), *(values or ())])


def main() -> None:
    """Run the command line; what a terminal cannot show is written as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app()
