"""Record of a training run: its recipe, and the options that changed while it was stopped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

# Options that decide nothing about the weights.
_UNRECORDED: tuple[str, ...] = ("evaluate", "gallery", "prepare", "limits", "output", "data.cache", "data.num_workers")
_UNRECORDED += ("train.steps", "train.log_every", "train.save_every", "train.keep_checkpoints", "train.trackers")
_UNRECORDED += ("train.sample_every", "train.samples")


@dataclass(frozen=True)
class Change:
    """Change of an option at a resume.

    Attributes:
        update: the first update with the new value.
        key: the option, such as "train.lr".
        before: the former value.
        now: the new value.
    """

    update: int
    key: str
    before: object
    now: object

    def __str__(self) -> str:
        return f"{self.key}: {self.before} -> {self.now} from update {self.update} on"


@dataclass(frozen=True)
class Record:
    """Recipe of a run, as of its last update, and all changes before.

    Attributes:
        recipe: the recipe's sections and options.
        changes: the changes of options, in order.
    """

    recipe: Mapping[str, object] = field(default_factory=dict)
    changes: tuple[Change, ...] = ()

    def resumed(self, recipe: Mapping[str, object], update: int) -> Record:
        """Return the record of a run that resumes with another recipe; `update` is the next update's number."""
        before, now = (dict(options(tree)) for tree in (self.recipe, recipe))
        # Options of both recipes, since one may be new or gone
        changed = [
            Change(update, key, before.get(key), now.get(key))
            for key in {**before, **now}
            if before.get(key) != now.get(key) and not key.startswith(_UNRECORDED)
        ]
        return Record(recipe, (*self.changes, *changed))


def options(tree: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the options of a recipe by their whole keys."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from options(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
