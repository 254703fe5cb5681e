"""Checkpoints: whole or not at all, the last and the best kept, strangers and damaged ones refused in a sentence."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from mmalign import atomic_io
from mmalign.training import checkpoint

MINE = {"model": "aaaa", "method": "diffusion_dpo"}


def weights(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"layer.weight": torch.full((3, 2), value), "layer.bias": torch.arange(3.0)}


def write(folder: Path, step: int, *, value: float = 1.0, keep: int = 2, **options: Any) -> Path:
    state = {"progress": {"step": step}, "average": [torch.ones(2)], "generator": torch.get_rng_state()}
    return checkpoint.write(folder, step, weights(value), state, MINE, keep_checkpoints=keep, **options)


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def raiser(error: Exception) -> Callable[..., None]:
    def raises(*_: Any, **__: Any) -> None:
        raise error

    return raises


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "runs" / "new", 7)
    assert path == checkpoint.latest(tmp_path / "runs" / "new")
    saved = checkpoint.read(path, MINE)
    assert saved.step == 7 and saved.state["progress"] == {"step": 7}
    for name, tensor in weights().items():
        assert torch.equal(saved.weights[name], tensor)
    assert torch.equal(saved.state["generator"], torch.get_rng_state())


def test_saves_weights_of_any_strides(tmp_path: Path) -> None:
    net = torch.nn.Linear(3, 2)
    named = {"w": net.weight, "t": net.weight.t().contiguous().t()}
    saved = checkpoint.read(checkpoint.write(tmp_path, 1, named, {}, MINE, keep_checkpoints=1), MINE)
    assert torch.equal(saved.weights["w"], net.weight) and torch.equal(saved.weights["t"], net.weight)


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "absent") is None
    assert checkpoint.best(tmp_path) is None


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    for step, score in ((10, 0.5), (20, 0.2), (30, 0.3), (40, 0.4), (50, 0.6)):
        write(tmp_path, step, keep=2, score=score)
    assert steps(tmp_path) == [20, 40, 50]
    assert checkpoint.best(tmp_path) == tmp_path / "checkpoint-00000020"
    write(tmp_path, 60, keep=1, score=0.1)
    assert steps(tmp_path) == [60] and leftovers(tmp_path) == []


def test_copies_with_names_of_their_own_are_the_user_s(tmp_path: Path) -> None:
    first = write(tmp_path, 1)
    for name in ("checkpoint-best", "checkpoint-00000001 (copy)", "checkpoint-1"):
        shutil.copytree(first, tmp_path / name)
    last = write(tmp_path, 2, keep=1)
    assert checkpoint.complete(tmp_path) == [last] and not leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint-00000002",
        "checkpoint-best",
        "checkpoint-00000001 (copy)",
        "checkpoint-1",
    }


def test_without_scores_only_the_last_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10, 200):
        write(tmp_path, step, keep=2)
    assert steps(tmp_path) == [10, 200]
    assert checkpoint.best(tmp_path) is None


def test_one_that_cannot_be_gone_on_from_takes_no_other_s_place(tmp_path: Path) -> None:
    for step in (2, 4):
        write(tmp_path, step, keep=1)
    last = write(tmp_path, 5, keep=1, resumable=False)
    assert steps(tmp_path) == [4, 5] and checkpoint.latest(tmp_path) == last
    assert checkpoint.latest(tmp_path, resumable=True) == tmp_path / "checkpoint-00000004"
    write(tmp_path, 6, keep=1)
    assert steps(tmp_path) == [6] == [int(checkpoint.latest(tmp_path, resumable=True).name[-1])]  # type: ignore[union-attr]


def test_one_that_does_not_say_whether_it_rests_does(tmp_path: Path) -> None:
    """As those written before there were others."""
    about = write(tmp_path, 2) / "checkpoint.json"
    about.write_text(json.dumps({k: v for k, v in json.loads(about.read_text()).items() if k != "resting"}))
    assert checkpoint.latest(tmp_path, resumable=True) == about.parent


def test_a_score_that_is_no_number_is_never_the_best(tmp_path: Path) -> None:
    for step, score in ((1, float("nan")), (2, 0.5), (3, float("-inf")), (4, 0.4), (5, None)):
        write(tmp_path, step, keep=5, score=score)
    assert checkpoint.best(tmp_path) == tmp_path / "checkpoint-00000004"


def test_the_same_step_again_replaces_what_was_there(tmp_path: Path) -> None:
    write(tmp_path, 5, value=1.0)
    path = write(tmp_path, 5, value=2.0)
    assert torch.equal(checkpoint.read(path, MINE).weights["layer.weight"], torch.full((3, 2), 2.0))
    assert steps(tmp_path) == [5] and leftovers(tmp_path) == []


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("location", "error"),
    [
        ("mmalign.training.checkpoint.save_file", FULL),
        (
            "mmalign.training.checkpoint.save_file",
            SafetensorError("IoError(Os { code: 28, message: No space left on device })"),
        ),
        ("torch.save", FULL),
        ("torch.save", RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")),
        ("os.fsync", FULL),
        ("os.replace", FULL),
        ("pathlib.Path.mkdir", PermissionError(errno.EACCES, "Permission denied")),
    ],
)
def test_a_failed_write_is_a_sentence_and_loses_nothing(
    location: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 10)
    for step in (10, 20):  # also where it would replace the one that is there
        with monkeypatch.context() as patch:
            patch.setattr(location, raiser(error))
            with pytest.raises(atomic_io.CheckpointError) as raised:
                write(tmp_path, step, value=9.0)
        text = str(raised.value)
        assert f"checkpoint-{step:08d}: could not be written (" in text and "MB are free" in text
        assert "earlier files are unchanged; free some space" in text
        cause = raised.value.__cause__
        assert cause is not None and error in (cause, cause.__cause__)
        assert steps(tmp_path) == [10] and leftovers(tmp_path) == []
        kept = checkpoint.read(tmp_path / "checkpoint-00000010", MINE)
        assert torch.equal(kept.weights["layer.weight"], torch.ones(3, 2))
    write(tmp_path, 20)
    assert steps(tmp_path) == [10, 20]


def test_a_replacement_that_fails_halfway_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, replace = write(tmp_path, 10), os.replace

    def fails_for_the_new(source: Path, target: Path) -> None:
        if source.name.endswith("-part"):
            raise FULL
        replace(source, target)

    monkeypatch.setattr("os.replace", fails_for_the_new)
    with pytest.raises(atomic_io.CheckpointError):
        write(tmp_path, 10, value=9.0)
    assert torch.equal(checkpoint.read(path, MINE).weights["layer.weight"], torch.ones(3, 2))


def test_a_full_disk_at_the_first_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pathlib.Path.mkdir", raiser(FULL))
    with pytest.raises(atomic_io.CheckpointError, match=r"could not be written .* MB are free"):
        write(tmp_path / "not" / "there" / "yet", 10)


def test_killed_write_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    old = write(tmp_path, 10)
    write(tmp_path, 20).rename(tmp_path / ".checkpoint-00000020.mmalign-part")
    assert checkpoint.latest(tmp_path) == old and steps(tmp_path) == [10]
    checkpoint.read(old, MINE)
    write(tmp_path, 30)
    assert leftovers(tmp_path) == [] and steps(tmp_path) == [10, 30]


def test_a_stranger_is_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path, 10)
    with pytest.raises(ValueError) as raised:
        checkpoint.read(path, {"model": "bbbb", "method": "diffusion_dpo"})
    assert str(raised.value) == (
        f"{path}: belongs to another run (model aaaa; this one has model bbbb); use another output folder, or the "
        "settings of that run"
    )
    with pytest.raises(ValueError, match=r"\(data none; this one has data x\)"):
        checkpoint.read(path, {**MINE, "data": "x"})
    with pytest.raises(ValueError, match=rf"\(method {MINE['method']}; this one has method none\)"):
        checkpoint.read(path, {name: value for name, value in MINE.items() if name != "method"})


@pytest.mark.parametrize("share", [0.0, 0.5, 0.97])
@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "checkpoint.json"])
def test_a_truncated_file_is_a_sentence(name: str, share: float, tmp_path: Path) -> None:
    path = write(tmp_path, 10)
    whole = (path / name).read_bytes()
    (path / name).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError) as raised:
        checkpoint.read(path, MINE)
    text = str(raised.value)
    assert text.startswith(f"{path}: is damaged (") and "\n" not in text
    assert len(text) < len(str(path)) + 300


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "checkpoint.json"])
def test_a_missing_file_is_a_sentence(name: str, tmp_path: Path) -> None:
    path = write(tmp_path, 10)
    (path / name).unlink()
    with pytest.raises(ValueError, match=f"is damaged .{name} is missing"):
        checkpoint.read(path, MINE)
    assert (checkpoint.latest(tmp_path) is None) is (name == "checkpoint.json")  # which is written last


@pytest.mark.parametrize("content", [[], 3, {}, {"step": None, "identity": {}}, {"step": 1, "identity": 3}])
def test_a_description_with_other_content_is_a_sentence(content: Any, tmp_path: Path) -> None:
    path = write(tmp_path, 10)
    (path / "checkpoint.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.read(path, MINE)


def test_a_damaged_old_one_does_not_stop_the_next(tmp_path: Path) -> None:
    (write(tmp_path, 10, score=0.1) / "checkpoint.json").write_text("")
    write(tmp_path, 20, score=0.3)
    write(tmp_path, 30, score=0.4)
    assert steps(tmp_path) == [20, 30]
    assert checkpoint.best(tmp_path) == tmp_path / "checkpoint-00000020"


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied"), MemoryError("32 GB")])
def test_unreadable_checkpoint_is_not_called_damaged(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, 10)
    monkeypatch.setattr("mmalign.training.checkpoint.load_file", raiser(error))
    with pytest.raises(ValueError, match=r"cannot be read now .* may be sound") as raised:
        checkpoint.read(path, MINE)
    assert not isinstance(raised.value, checkpoint.DamagedCheckpointError)


def test_weights_that_are_not_finite_are_damage(tmp_path: Path) -> None:
    with pytest.raises(checkpoint.DamagedCheckpointError, match=r"layer\.weight is not finite"):
        checkpoint.read(write(tmp_path, 10, value=float("nan")), MINE)


def test_state_of_foreign_types_is_never_executed(tmp_path: Path) -> None:
    path = write(tmp_path, 10)
    torch.save({"progress": Path("/")}, path / "state.pt")
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.read(path, MINE)
