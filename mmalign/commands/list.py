"""`mmalign list`: methods, losses, model families, reward models and bundled recipes."""

from __future__ import annotations

from collections import defaultdict

from rich.console import Console
from rich.table import Table

from mmalign import methods, rewards
from mmalign.commands.load_recipe import load_recipe
from mmalign.config import Recipe
from mmalign.config.losses import PairLossConfig
from mmalign.config.methods import METHODS
from mmalign.families import loading
from mmalign.resources import bundled_recipes


def list_everything(console: Console) -> None:
    """Print the methods by modality, losses, families, reward models and bundled recipes."""
    files, by_method = bundled_recipes(), defaultdict[str, list[Recipe]](list)
    for recipe in map(load_recipe, files.values()):
        by_method[recipe.method.name].append(recipe)
    for modality, configs in METHODS.items():
        table = Table("method", "reference", "data", "recipes", title=modality, title_justify="left", box=None)
        for config in configs:
            name = str(config.model_fields["name"].default)
            table.add_row(name, *_needs(by_method[name]), str(len(by_method[name])))
        console.print(table)
    losses = Table("loss", "reference", "scores of responses", "use", title="losses", title_justify="left", box=None)
    for loss in PairLossConfig.__subclasses__():
        name = str(loss.model_fields["name"].default)
        losses.add_row(name, "yes" if loss.reference else "no", loss.score, (loss.__doc__ or "").splitlines()[0])
    console.print(losses)
    pipelines = ", ".join(f"{file} ({cls})" for cls, file in loading.PIPELINES.items())
    console.print(f"\nfamilies: {pipelines}, vision_language (AutoModelForImageTextToText)")
    table = Table("judge", "meaning", title="\nrewards", title_justify="left", box=None)
    for name in rewards.names():
        table.add_row(name, (rewards.reward_module(name).__doc__ or "").splitlines()[0])
    console.print(table)
    console.print("\nrecipes:")
    for name, path in files.items():
        console.print(f"  {name}  {path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}")


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
