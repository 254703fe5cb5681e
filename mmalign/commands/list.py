"""`mmalign list`: methods, losses, data layouts, model families, reward models and bundled recipes."""

from __future__ import annotations

from collections import defaultdict

from rich.console import Console
from rich.table import Table

from mmalign import methods, rewards
from mmalign.commands.load_recipe import load_recipe
from mmalign.config import Recipe
from mmalign.config.base import Choice
from mmalign.config.judged_losses import GroupLossConfig, UnpairedLossConfig
from mmalign.config.losses import PairLossConfig
from mmalign.config.methods import METHODS
from mmalign.data.formats import conversations, image_layouts
from mmalign.families import loading
from mmalign.resources import bundled_recipes


def list_everything(console: Console) -> None:
    """Print the methods by modality, losses and layouts by kind, families, reward models and bundled recipes."""
    # A bundled recipe of each method tells what the method needs
    files, by_method = bundled_recipes(), defaultdict[str, list[Recipe]](list)
    for recipe in map(load_recipe, files.values()):
        by_method[recipe.method.name].append(recipe)
    for modality, configs in METHODS.items():
        table = _table(modality, "method", "reference", "data", "recipes")
        for config in configs:
            name = str(config.model_fields["name"].default)
            table.add_row(name, *_needs(by_method[name]), str(len(by_method[name])))
        console.print(table)
    _print_losses(console)
    _print_layouts(console)
    pipelines = ", ".join(f"{file} ({cls})" for cls, file in loading.PIPELINES.items())
    console.print(f"\nfamilies: {pipelines}, vision_language (AutoModelForImageTextToText)")
    table = _table("\nrewards", "judge", "meaning")
    for name in rewards.names():
        table.add_row(name, _first_line(rewards.reward_module(name).__doc__))
    console.print(table)
    console.print("\nrecipes:")
    for name, path in files.items():
        console.print(f"  {name}  {path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}")


def _table(title: str, *columns: str) -> Table:
    return Table(*columns, title=title, title_justify="left", box=None)


def _print_losses(console: Console) -> None:
    """Print the losses of pairs, of single outputs and of lists."""
    table = _table("losses of pairs", "loss", "reference", "scores of responses", "use")
    for name, loss in Choice.sections(PairLossConfig).items():
        table.add_row(name, "yes" if loss.reference else "no", loss.score, _first_line(loss.__doc__))
    console.print(table)
    for title, kind in (("losses of single outputs", UnpairedLossConfig), ("losses of lists", GroupLossConfig)):
        table = _table(title, "loss", "use")
        for name, judged_loss in Choice.sections(kind).items():
            table.add_row(name, _first_line(judged_loss.__doc__))
        console.print(table)


def _print_layouts(console: Console) -> None:
    """Print the layouts of preference data with their columns."""
    for title, module in (("layouts of images", image_layouts), ("layouts of responses", conversations)):
        table = _table(title, "data.format", "required columns", "optional columns")
        for layout in (*module.LAYOUTS, module.THUMBS):
            required = [column.replace("|", " or ") for column in layout.required]
            table.add_row(layout.name, ", ".join(required), ", ".join(layout.optional))
        console.print(table)


def _first_line(docstring: str | None) -> str:
    return (docstring or "").splitlines()[0]


def _needs(recipes: list[Recipe]) -> tuple[str, str]:
    """Return whether a method has a reference, and the data that it takes, by its first recipe."""
    if not recipes:
        return "", ""
    needs = methods.requirements_of(recipes[0].method)
    data: str = needs.learns_from
    if needs.prompt_pairs:
        data = "pairs with two prompts"
    elif needs.other_images:
        data = "pairs with another image"
    return ("yes" if needs.reference else "no"), data
