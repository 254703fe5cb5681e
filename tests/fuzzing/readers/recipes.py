"""Recipes in YAML, and overrides of their options."""

from pathlib import Path

from hypothesis import strategies as st

from mmalign.commands.load_recipe import load_recipe
from tests.fuzzing.mutations import ODD_TEXTS
from tests.fuzzing.rule import Files, Reader

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*_*/*.yaml"))
VALID = b"method: {name: diffusion_dpo}\nmodel: {path: models/tiny_sd}\ndata: {path: a.parquet, resolution: 32}\n"
VALID += b"train: {steps: 1, lr: 1e-5}\noutput: runs/x\n"
KEYS = ["method", "name", "dpo", "spo", "model", "path", "data", "train", "lr", "betas", "evaluate", "loss", "output"]
SIGNS = [
    "<<",
    "&a",
    "*a",
    "*a *a",
    "?",
    "-",
    "|",
    ">",
    "%TAG",
    "---",
    "...",
    "\t",
    "#",
    "!!binary",
    "!!set",
    "!!timestamp 1",
]
SCALARS = [
    "null",
    "~",
    "yes",
    "1e-5",
    "-1",
    ".inf",
    ".nan",
    "2026-13-01",
    "0o17",
    "1" * 400,
    "!!python/object:os.system",
]
WORDS = st.sampled_from([*KEYS, *SIGNS, *SCALARS])


def values(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Return flow collections of YAML."""
    lists = st.lists(inner, max_size=4).map(lambda parts: f"[{', '.join(parts)}]")
    pairs = st.tuples(WORDS, inner).map(": ".join)
    return lists | st.lists(pairs, max_size=4).map(lambda parts: f"{{{', '.join(parts)}}}")


VALUES = st.recursive(WORDS | st.sampled_from(ODD_TEXTS) | st.text(max_size=6), values, max_leaves=12)
LINES = st.tuples(st.sampled_from(["", "  ", "    "]), WORDS, st.sampled_from([": ", ":\n      ", " "]), VALUES)
TEXTS = st.lists(LINES.map("".join), max_size=8).map("\n".join)


def as_files(text: str) -> Files:
    return {"recipe.yaml": text.encode("utf-8", "surrogatepass")}


SECTIONS = {"model": {"path": "m"}, "data": {"path": "d"}, "train": {"steps": 1, "lr": 1e-5}, "output": "runs/x"}


def read_override(folder: Path) -> None:
    text = b"".join(path.read_bytes() for path in folder.iterdir() if path.is_file()).decode("utf-8", "replace")
    load_recipe({"method": {"name": "dpo"}, **SECTIONS}, text.splitlines())


PATHS = st.lists(WORDS, min_size=1, max_size=4).map(".".join)
OVERRIDES = st.lists(st.tuples(PATHS, st.sampled_from(["=", ""]), VALUES).map("".join), max_size=3).map("\n".join)

READERS = (
    Reader(
        "recipes",
        lambda folder: load_recipe(folder / "recipe.yaml"),
        tuple({"recipe.yaml": content} for content in (VALID, *(path.read_bytes() for path in CONFIGS))),
        share=60,
        generated=st.one_of(TEXTS, TEXTS.map(lambda text: VALID.decode() + text)).map(as_files),
    ),
    Reader(
        "overrides",
        read_override,
        ({"override.txt": b"train.lr=1e-4\nmethod.beta=0.1"},),
        share=20,
        places=(":",),  # the message begins with the assignment, or its key
        generated=OVERRIDES.map(lambda text: {"override.txt": text.encode("utf-8", "replace")}),
    ),
)
