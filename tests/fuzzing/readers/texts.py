"""Files of prompts and of prompt pairs."""

from pathlib import Path

from hypothesis import strategies as st

from mmalign.data.formats.prompts import open_prompts
from mmalign.modalities.prompts import read_prompt_pairs, read_prompts
from tests.fuzzing.rule import Reader

SOUND = ({"prompts.txt": b"# two\na fox\n\na cat\na fox\n"}, {"prompts.txt": "ein Hüne\tein Zwerg\n".encode()})
LINES = st.lists(st.text(max_size=12), max_size=4).map(lambda lines: {"prompts.txt": "\n".join(lines).encode("utf-16")})


def read(folder: Path) -> None:
    pairs = open_prompts(str(folder / "prompts.txt"))
    _ = [pair.content for pair in pairs], pairs.summary()
    read_prompts("evaluate.prompts", str(folder / "prompts.txt"))


READERS = (
    Reader("prompts", read, SOUND, share=30, generated=LINES),
    Reader(
        "prompt pairs",
        lambda folder: read_prompt_pairs("prepare.prompts", str(folder / "prompts.txt")),
        SOUND[1:],
        share=20,
        generated=LINES,
    ),
)
