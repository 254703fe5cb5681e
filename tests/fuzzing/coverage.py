"""Fuzzing that follows coverage: atheris changes bytes of a file, and keeps what reaches new code of mmalign.

An input of libFuzzer is one byte, which chooses a file of a reader's sound files, and the content that replaces it.
"""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.fuzzing.rule import Files, Reader


def fuzz_by_coverage(only: str, examples: int, seed: int) -> int:
    """Fuzz the only reader whose name has a text in it; libFuzzer ends the process, with an error if it broke the rule.

    Raises:
        SystemExit: atheris is not installed, or not one reader has such a name.
    """
    try:
        import atheris
    except ImportError:
        raise SystemExit("atheris is not installed: pip install atheris (it has wheels for Linux on x86-64)") from None
    with atheris.instrument_imports(include=["mmalign"], enable_loader_override=False):
        from tests.fuzzing.rule import check
        from tests.fuzzing.suite import READERS
    readers = [reader for reader in READERS if only in reader.name]
    if len(readers) != 1:
        names = ", ".join(reader.name for reader in readers)
        raise SystemExit(f"--engine atheris fuzzes one reader, and --only {only!r} names {len(readers)}: {names}")
    (reader,) = readers
    with tempfile.TemporaryDirectory() as corpus:
        for number, content in enumerate(seeds(reader)):
            Path(corpus, str(number)).write_bytes(content)
        limits = [f"-runs={examples}", f"-seed={seed + 1}", "-rss_limit_mb=8192", "-max_len=65536"]
        atheris.Setup(["fuzzing", *limits, corpus], lambda data: check(reader, decoded(reader, data)) and None)
        atheris.Fuzz()
    return 0


def seeds(reader: "Reader") -> list[bytes]:
    """Return the inputs that stand for the reader's sound files."""
    (files, *_) = reader.sound
    return [bytes([number]) + files[name] for number, name in enumerate(sorted(files))]


def decoded(reader: "Reader", data: bytes) -> "Files":
    """Return the sound files with the content of an input in the place of one of them."""
    (files, *_) = reader.sound
    names = sorted(files)
    return {**files, names[data[0] % len(names)]: data[1:]} if data else dict(files)
