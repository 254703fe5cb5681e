"""Every reader, and how many inputs it gets."""

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzzing.readers import (
    benchmarks,
    caches,
    checkpoints,
    evaluations,
    models,
    pictures,
    recipes,
    rows,
    tables,
    texts,
)
from tests.fuzzing.rule import Reader, check

MODULES = (recipes, rows, tables, pictures, checkpoints, caches, texts, benchmarks, models, evaluations)
READERS: tuple[Reader, ...] = tuple(reader for module in MODULES for reader in module.READERS)


def fuzz(reader: Reader, number: int, *, seed_number: int | None = None, shrink: bool = True) -> tuple[int, int]:
    """Read inputs of a reader, and return how many there were and how many ended in a sentence.

    Args:
        reader: the reader.
        number: the number of inputs.
        seed_number: the seed of the inputs; the same inputs every time if not given.
        shrink: make the input of a failure as small as possible.

    Raises:
        Exception: an input broke the rule.
    """
    counts = [0, 0]

    @settings(
        max_examples=number,
        derandomize=seed_number is None,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if shrink else [])],
    )
    @given(files=reader.inputs)
    def keep_the_rule(files: dict[str, bytes]) -> None:
        counts[0] += 1
        counts[1] += bool(check(reader, files))

    if seed_number is not None:
        seed(seed_number)(keep_the_rule)()
    else:
        keep_the_rule()
    return counts[0], counts[1]
