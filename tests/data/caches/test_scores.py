"""Scores on disk by content: nothing is judged twice, nothing is lost, and another judge has scores of its own."""

import sys
import tracemalloc
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from mmalign.data.caches import journal
from mmalign.data.caches.fingerprint import fingerprint_judge
from mmalign.data.caches.scores import CHUNK, CachedJudge, CachedResponseJudge, ScoreCache
from mmalign.rewards import Shown, Truths
from mmalign.training.processes import Processes

RED, BLUE = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")


def stored(folder: Path, identity: str, *, chunk: int = CHUNK) -> ScoreCache:
    return ScoreCache(folder, identity, Processes(), chunk=chunk)


class Counting:
    """Judge that counts the images it scores, and fails from a number of calls on."""

    def __init__(self, calls: int = 1000) -> None:
        self.judged, self.calls = 0, calls

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str], t: Tensor | None = None) -> Tensor:
        self.calls -= 1
        if self.calls < 0:
            raise ConnectionError
        self.judged += len(images)
        return torch.tensor([len(p) / 3 + i.getpixel((0, 0))[2] for i, p in zip(images, prompts, strict=True)])


def test_a_second_run_judges_nothing_and_scores_the_same(tmp_path: Path) -> None:
    first, second = Counting(), Counting()
    images, prompts = [RED, BLUE, RED, RED], ["a", "a", "a", "bc"]
    scores = CachedJudge(first, stored(tmp_path, "x"))(images, prompts)
    assert first.judged == 3  # the first and the third are the same
    torch.testing.assert_close(CachedJudge(second, stored(tmp_path, "x"))(images, prompts), scores, rtol=0, atol=0)
    assert second.judged == 0 and scores.dtype == torch.float32


def test_other_judges_images_and_prompts_are_judged(tmp_path: Path) -> None:
    CachedJudge(Counting(), stored(tmp_path, "x"))([RED], ["a"])
    for identity, image, prompt in (("y", RED, "a"), ("x", BLUE, "a"), ("x", RED, "b"), ("x", RED.resize((4, 4)), "a")):
        judge = Counting()
        CachedJudge(judge, stored(tmp_path, identity))([image], [prompt])
        assert judge.judged == 1
    noisy = Counting()
    cached = CachedJudge(noisy, stored(tmp_path, "x"))
    for _ in range(2):
        cached([RED], ["a"], torch.tensor([1.0]))
    assert noisy.judged == 2


def test_scores_of_responses_are_stored_by_images_question_and_answer(tmp_path: Path) -> None:
    judged = list[str]()

    def judge(images: Shown, prompts: Sequence[str], responses: Sequence[str], truths: Truths | None = None) -> Tensor:
        judged.extend(responses)
        return torch.tensor([float(len(text)) for text in responses])

    images, prompts, responses = [[RED], [RED], [RED, BLUE], [RED]], ["a", "a", "a", "b"], ["x", "xyz", "x", "x"]
    scores = CachedResponseJudge(judge, stored(tmp_path, "x"))(images, prompts, responses)
    assert scores.tolist() == [1, 3, 1, 1] and len(judged) == 4
    again = CachedResponseJudge(judge, stored(tmp_path, "x"))
    assert again([[RED.copy()]], ["a"], ["xyz"]).tolist() == [3] and len(judged) == 4


def test_scores_by_true_answers_are_stored_under_these(tmp_path: Path) -> None:
    judged = list[Sequence[str]]()

    def judge(images: Shown, prompts: Sequence[str], responses: Sequence[str], truths: Truths | None = None) -> Tensor:
        judged.extend(truths or [("none",)] * len(responses))
        return torch.tensor([float(len(truth)) for truth in truths or [()] * len(responses)])

    cached = CachedResponseJudge(judge, stored(tmp_path, "x"))
    for _ in range(2):
        assert cached([[RED]] * 2, ["a"] * 2, ["x"] * 2, [["dog"], ["dog", "mat"]]).tolist() == [1, 2]
    assert judged == [["dog"], ["dog", "mat"]]
    assert cached([[RED]], ["a"], ["x"]).tolist() == [0] and judged[-1] == ("none",)


def test_judges_of_one_identity_share_their_scores(tmp_path: Path) -> None:
    """As the judge that chooses the best of n and the one that measures, or two runs with one `evaluate.cache`."""
    counting = Counting()
    chooser, measure = (CachedJudge(counting, stored(tmp_path, "x")) for _ in range(2))
    scores = chooser([RED, BLUE], ["a", "a"])
    torch.testing.assert_close(measure([BLUE, RED], ["a", "a"]), scores.flip(0), rtol=0, atol=0)
    assert counting.judged == 2 and chooser([BLUE], ["a"]).tolist() == scores[1:].tolist()


def test_a_failing_judge_loses_no_score(tmp_path: Path) -> None:
    images, prompts = [RED] * 3 * CHUNK, [f"prompt {number}" for number in range(3 * CHUNK)]
    failing, rest = Counting(calls=2), Counting()
    with pytest.raises(ConnectionError):
        CachedJudge(failing, stored(tmp_path, "x"))(images, prompts)
    CachedJudge(rest, stored(tmp_path, "x"))(images, prompts)
    assert (failing.judged, rest.judged) == (2 * CHUNK, CHUNK)


def test_a_question_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A question may be longer than a file's name, and an empty option does not name the current folder."""
    monkeypatch.chdir(tmp_path)
    options = {"question": "Is it so? " * 30 + "{prompt}", "yes": ""}
    before = fingerprint_judge("vlm", "org/name", options)
    (tmp_path / "notes.txt").write_text("new")
    assert fingerprint_judge("vlm", "org/name", options) == before
    assert fingerprint_judge("vlm", "org/name", {**options, "question": "{prompt}?"}) != before


def test_options_of_calls_are_no_part_of_a_judges_identity() -> None:
    """After a server's failure a smaller batch or a longer timeout finds the scores so far."""
    options = {"batch_size": 2, "timeout": 9.0, "retries": 1, "wait": 0.0}
    assert fingerprint_judge("http", "http://host/", options) == fingerprint_judge("http", "http://host/", {})
    own = [fingerprint_judge("mmalign.rewards.http:Config", "none", {"wait": wait}) for wait in (0, 1)]
    assert own[0] != own[1]  # of a judge from outside the meaning is unknown


def test_weights_are_hashed_in_little_memory(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(bytes(2**23))
    fingerprint_judge("open_clip", str(tmp_path), {})  # imports
    tracemalloc.start()
    fingerprint_judge("open_clip", str(tmp_path), {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**21


def test_a_judges_identity_is_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    weights, code = tmp_path / "judge" / "model.safetensors", tmp_path / "judging.py"
    weights.parent.mkdir()
    weights.write_bytes(b"1")
    code.write_text("def f(images, prompts): return [0] * len(images)")

    def identities() -> list[str | None]:
        return [
            fingerprint_judge("open_clip", str(weights.parent), {}),
            fingerprint_judge("open_clip", str(weights.parent), {"precision": "float32"}),
            fingerprint_judge("function", "judging:f", {}, runs_path=True),
            fingerprint_judge("judging:Options", "none", {}),
            fingerprint_judge("open_clip", "org/name", {}),
            fingerprint_judge("open_clip", "hf-hub:org/name", {}),
        ]

    before = identities()
    assert len(set(before)) == len(before) and None not in before
    weights.write_bytes(b"2")
    code.write_text("def f(images, prompts): return [1] * len(images)")
    assert [new == old for new, old in zip(identities(), before, strict=True)] == [False] * 4 + [True] * 2
    monkeypatch.setitem(sys.modules, "typed_in", type(sys)("typed_in"))  # as in a notebook
    assert fingerprint_judge("function", "typed_in:f", {}, runs_path=True) is None


class Team:
    """Threads that gather as the processes of a launch do."""

    def __init__(self, rank: int, values: list[object], barrier: Barrier) -> None:
        self.rank, self.size, self._values, self._barrier = rank, len(values), values, barrier

    def gather(self, value: Any) -> list[Any]:
        self._values[self.rank] = value
        self._barrier.wait(timeout=60)
        values = [*self._values]
        self._barrier.wait(timeout=60)
        return values


def test_processes_judge_in_turn_and_write_what_one_would(tmp_path: Path) -> None:
    """Three processes, chunks of two, and eleven images."""
    images, prompts = [RED, BLUE] * 5 + [RED], [f"prompt {number}" for number in range(11)]
    for folder in ("one", "three"):
        (tmp_path / folder).mkdir()
    alone = CachedJudge(Counting(), stored(tmp_path / "one", "x", chunk=2))(images, prompts)
    barrier, values, judges = Barrier(3), [None] * 3, [Counting() for _ in range(3)]

    def run(rank: int) -> Tensor:
        cache = ScoreCache(tmp_path / "three", "x", Team(rank, values, barrier), chunk=2)  # type: ignore[arg-type]
        return CachedJudge(judges[rank], cache)(images, prompts)

    with ThreadPoolExecutor(3) as pool:
        scores = list(pool.map(run, range(3)))
    assert all(torch.equal(each, alone) for each in scores)
    assert [judge.judged for judge in judges] == [4, 4, 3]
    assert (tmp_path / "three/x.jsonl").read_bytes() == (tmp_path / "one/x.jsonl").read_bytes()


def test_a_file_that_nobody_else_writes_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long job calls its judge many times; each reading of all scores so far would make it quadratic."""
    readings, check = list[object](), journal.check_file
    monkeypatch.setattr(journal, "check_file", lambda path: (readings.append(path), check(path)))
    counting = Counting()
    judge, other = (CachedJudge(counting, stored(tmp_path, "x")) for _ in range(2))
    readings.clear()
    for number in range(5):
        judge([RED], [f"{number}"])
    assert not readings and counting.judged == 5
    other([RED] * 2, ["4", "5"])
    assert len(readings) == 1 and counting.judged == 6
