"""The command line: arguments in, sentences out."""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Align text-to-image models with human preferences.",
)
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a value of the recipe, e.g. train.lr=1e-5."),
]
RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped one; see `mmalign list`.")
]
console = Console(highlight=False, soft_wrap=True)


@app.command()
def quickstart(
    seed: Annotated[int, typer.Option(help="Seed of the training.")] = 0,
    draw: Annotated[
        bool, typer.Option("--draw", help="Draw and judge the preference pairs anew, instead of the shipped ones.")
    ] = False,
    output: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("runs/quickstart"),
) -> None:
    """Align the bundled model on this machine, without a network, and show the proof: some minutes on two cores."""
    from mmalign.quickstart import quickstart as run

    run(seed=seed, draw=draw, output=output, say=console.print)


@app.command()
def train(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Train by a recipe; the same command again goes on where it stopped."""
    from mmalign import run

    run.train(_load(recipe, overrides), say=console.print)


@app.command()
def evaluate(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Compare the base model with the trained one: same prompts, same seeds, differences with 95 % intervals."""
    from mmalign import run

    run.evaluate(_load(recipe, overrides), say=console.print)


@app.command()
def gallery(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Make the before-and-after page, of what was evaluated."""
    from mmalign import run

    run.gallery(_load(recipe, overrides), say=console.print)


@app.command()
def prepare(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Draw images from the recipe's model, let its judge compare them, and write the pairs to data.path."""
    from mmalign import run

    run.prepare(_load(recipe, overrides), say=console.print)


@app.command("list")
def list_() -> None:
    """List methods, families, judges, and the recipes that come with the project."""
    from mmalign import run

    run.list_everything(console)


def _load(name: str, overrides: list[str] | None):  # type: ignore[no-untyped-def]
    from mmalign.recipe import load_recipe

    return load_recipe(name, overrides or ())


def main() -> None:
    """Run the command line; a mistake ends in its sentence, not in a traceback (MMALIGN_TRACEBACK=1 shows it)."""
    _quiet()
    from mmalign.checkpoint import CheckpointError

    try:
        app()
    except (ValueError, FloatingPointError, CheckpointError) as error:
        if os.environ.get("MMALIGN_TRACEBACK"):
            raise
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"error: {error}", style="red", markup=False)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; the same command goes on from the last checkpoint")
        raise SystemExit(130) from None


def _quiet() -> None:
    """The libraries' notices and loading bars say nothing that a person can act on here."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "0")
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
