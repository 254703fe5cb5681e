"""The rule that every reader keeps on any input: an answer, or one sentence of mmalign that names the place."""

import contextlib
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from hypothesis import strategies as st

import mmalign
from mmalign.atomic_io import CheckpointError
from tests.fuzzing.mutations import DEVICE, FOLDER, PIPE, Files, damaged

PACKAGE = str(Path(mmalign.__file__).parent)
PAGE = 10_000  # characters; a recipe has a line for each wrong key
HANGS = 120  # seconds on the clock, of which a busy machine gives a process few
SECONDS = 20.0  # of the processor for one input, which takes milliseconds


@dataclass(frozen=True)
class Reader:
    """A reader under test.

    Attributes:
        name: the reader's name in counts.
        read: read the files in a folder.
        sound: sound sets of files, which are read without an error and damaged.
        share: inputs of this reader in a thousand of the long form.
        places: words of which an error names one, besides the files' names.
        generated: a strategy of further sets of files.
    """

    name: str
    read: Callable[[Path], object]
    sound: tuple[Files, ...]
    share: int
    places: tuple[str, ...] = ()
    generated: st.SearchStrategy[Files] | None = None

    @property
    def inputs(self) -> st.SearchStrategy[Files]:
        """Damaged sets of files, and generated ones."""
        seeds = st.integers(0, 2**64).map(Random)
        mutated = st.builds(lambda rng: damaged(rng.choice(self.sound), rng), seeds)
        return mutated if self.generated is None else st.one_of(mutated, mutated, self.generated)


def write(folder: Path, files: Files) -> None:
    """Write files; some contents stand for a device without end, a pipe that nobody writes to, and a folder."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content == DEVICE:
            path.symlink_to("/dev/zero")
        elif content == PIPE:
            os.mkfifo(path)
        elif content == FOLDER:
            path.mkdir()
        else:
            path.write_bytes(content)


class HangError(BaseException):
    """Interruption of a reader that hangs; no `except Exception` takes it for damage of a file."""


@contextlib.contextmanager
def alarm() -> Iterator[None]:
    """Interrupt what hangs."""

    def stop(*_: object) -> None:
        raise HangError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(HANGS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check(reader: Reader, files: Files) -> str:
    """Read files, and return the sentence of the error, or nothing.

    Raises:
        AssertionError: the error is not one of mmalign, does not name the place, or took too long.
    """
    with tempfile.TemporaryDirectory(prefix="fuzz") as name:
        folder, started = Path(name), time.process_time()
        write(folder, files)
        sentence = ""
        try:
            with alarm():
                reader.read(folder)
        except (ValueError, CheckpointError) as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            raised = f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"
            assert last.filename.startswith(PACKAGE), f"only a library's words: {raised}"
            sentence = str(error)
            names = (*reader.places, *(part for name in files for part in (name, Path(name).name)), name)
            assert any(name in sentence for name in names), f"names no place: {raised}"
            assert len(sentence) < PAGE + sum(map(len, files.values())), f"a page: {raised[:PAGE]}"
        except HangError:
            raise AssertionError(f"hangs for {HANGS} s") from None
        except AssertionError as error:
            raise AssertionError(f"an assertion of the package: {error!r}") from error
        seconds = time.process_time() - started
        assert seconds < SECONDS, f"took {seconds:.0f} s"
    return sentence
