"""Training from full caches: the same losses, one network in memory, and nothing from another's cache."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmalign.commands import cache as caching
from mmalign.commands import train
from mmalign.commands.load_recipe import load_recipe
from mmalign.data.caches import precompute
from mmalign.data.caches.array_cache import ArrayCache
from mmalign.data.caches.precompute import PrecomputeCache, PrecomputeSpec
from mmalign.data.loaders.sampler import EpochSampler
from mmalign.families.vlm.model import ImageTextToText
from mmalign.methods import requirements_of
from mmalign.methods.vision_language import bdhs, dpo, mdpo, povid
from tests.helpers import Folders, data_files, first_fast
from tests.helpers.runs import EPOCH, assert_same, numbers, pictures, responses, trained

CPU = torch.device("cpu")

# What keeps the reference's scores, with the settings that it needs for it.
KEEPING: dict[str, dict[str, Any]] = {
    "dpo": {},
    "rlhfv": {},
    "realign": {},
    "mdpo": {"num_cached_draws": 2},
    "povid": {"num_cached_draws": 2},
    "bdhs": {},
}


@pytest.fixture
def no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen copy is an error."""
    monkeypatch.setattr(ImageTextToText, "frozen_copy", lambda _: pytest.fail("the network was copied"))


@pytest.mark.parametrize(
    ("method", "tune"), [*((name, "full") for name in KEEPING), ("dpo", "lora"), ("povid", "lora")]
)
def test_training_from_kept_scores_is_training_without_bit_for_bit(
    method: str, tune: str, vlm_folders: Folders, tmp_path: Path
) -> None:
    """An epoch, and of methods with two draws of a pair two; held-out pairs are scored, and activations accumulated."""
    draws = KEEPING[method].get("num_cached_draws", 1)
    sections: dict[str, Any] = {
        "method": {"name": method, **KEEPING[method]},
        "model": {"tune": tune},
        "data": {"format": "realign", "validation_fraction": 0.3},
        "train": {"steps": 2 * draws, "gradient_accumulation_steps": 1, "save_every": 2},
    }
    model = vlm_folders("llava")
    cached, weights = trained(responses(model, tmp_path, "cached", **sections))
    plain, reference_scores = trained(responses(model, tmp_path, "plain", **sections), "data.cache='off'")
    assert numbers(cached) == numbers(plain)
    assert_same(weights, reference_scores)
    assert list((tmp_path / "cached" / "cache" / "reference").rglob("*.safetensors"))
    assert not (tmp_path / "plain" / "cache").exists()


@pytest.mark.parametrize("method", KEEPING)
def test_at_the_first_update_the_loss_is_exactly_ln_2(
    method: str, vlm_folders: Folders, tmp_path: Path, no_copy: None
) -> None:
    """Of every term; and where the pairs were scored one by one instead, it would not be."""
    sections: dict[str, Any] = {"method": {"name": method, **KEEPING[method]}, "model": {"tune": "full"}}
    sections["train"] = {"steps": 1, "save_every": 1, "batch_size": 4}
    done, _ = trained(responses(vlm_folders("llava"), tmp_path, "out", **sections))
    (first,) = done.history
    ln2 = float(torch.tensor(math.log(2)))
    terms = [value for name, value in first.items() if name.endswith("loss") and name != "loss"]
    assert first["logit"] == 0 and first["accuracy"] == 0.5 and first["chosen gain"] == 0
    if not terms:
        assert first["loss"] == ln2
    assert all(value == ln2 or value == ln2 / 2 for value in terms)


@pytest.mark.slow
def test_later_epochs_are_the_same_to_rounding(vlm_folders: Folders, tmp_path: Path) -> None:
    """A pair's score is that of the batch that met it first: the reference itself rounds otherwise in another one."""
    sections: dict[str, Any] = {"train": {"steps": 3 * EPOCH, "save_every": 3 * EPOCH, "lr": 1e-3}}
    model = vlm_folders("llava")
    cached, _ = trained(responses(model, tmp_path, "cached", **sections))
    plain, _ = trained(responses(model, tmp_path, "plain", **sections), "data.cache='off'")
    assert numbers(cached)[:EPOCH] == numbers(plain)[:EPOCH]
    for ours, theirs in zip(cached.history[EPOCH:], plain.history[EPOCH:], strict=True):
        assert ours["logit"] == pytest.approx(theirs["logit"], abs=1e-3)  # of a logit that is beta = 0.1 times nats
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("tune", first_fast(["lora", "full"]))
@pytest.mark.parametrize("method", ["diffusion_dpo", "instruct_engine"])
def test_a_bank_of_draws_changes_nothing_until_they_come_again(
    method: str, tune: str, tiny_sd15: Path, tmp_path: Path
) -> None:
    """Against a run without the option, which draws anew: two epochs bit for bit, and in the third other draws."""
    sections: dict[str, Any] = {
        "model": {"tune": tune},
        "data": {"flip": True},
        "train": {"steps": 2 * EPOCH, "save_every": EPOCH},
    }
    data_files.pick_a_pic(tmp_path / "pairs.parquet", rejected={} if method == "instruct_engine" else None)
    plain = pictures(tiny_sd15, tmp_path, "plain", **sections, method={"name": method, "beta": 100.0})
    banked = {"name": method, "beta": 100.0, "num_cached_draws": 2}
    cached = pictures(tiny_sd15, tmp_path, "cached", **sections, method=banked)
    ours, theirs = trained(cached), trained(plain)
    assert numbers(ours[0]) == numbers(theirs[0])
    assert_same(ours[1], theirs[1])
    assert ours[0].history[0]["logit"] == 0
    more = f"train.steps={3 * EPOCH}"
    assert numbers(trained(cached, more)[0]) != numbers(trained(plain, more)[0])


def test_a_pair_that_cannot_be_read_keeps_its_place(vlm_folders: Folders, tmp_path: Path) -> None:
    """With a batch in which no pair counts."""
    model, sections = vlm_folders("llava"), {"model": {"tune": "full"}, "train": {"steps": 3, "batch_size": 1}}
    content = responses(model, tmp_path, "cached", **sections)
    for name in ("0.png", "2.png"):
        (tmp_path / "rows" / name).write_bytes(b"no picture")
    cached, weights = trained(content)
    plain, reference_scores = trained({**content, "output": str(tmp_path / "plain")}, "data.cache='off'")
    assert numbers(cached) == numbers(plain)
    assert_same(weights, reference_scores)


@pytest.mark.slow
def test_batches_with_a_pair_that_cannot_be_read_are_scored_once(
    vlm_folders: Folders, tmp_path: Path, asked: list[str]
) -> None:
    content = responses(vlm_folders("llava"), tmp_path, "out", train={"steps": EPOCH})
    (tmp_path / "rows" / "0.png").write_bytes(b"no picture")
    caching.cache(load_recipe(content))
    assert 0 < len(asked) <= EPOCH
    asked.clear()
    trained(content)
    assert asked == []


@pytest.mark.slow
@pytest.mark.parametrize("method", KEEPING)
def test_no_reference_is_loaded_or_run_in_a_training_from_kept_scores(
    method: str, vlm_folders: Folders, tmp_path: Path, no_copy: None, asked: list[str]
) -> None:
    sections: dict[str, Any] = {"method": {"name": method, **KEEPING[method]}}
    content = responses(vlm_folders("llava"), tmp_path, "out", **sections, train={"steps": 2 * EPOCH})
    caching.cache(load_recipe(content))
    assert asked
    asked.clear()
    trained(content)
    trained({**content, "output": str(tmp_path / "full")}, "model.tune=full", f"data.cache={tmp_path}/out/cache")
    assert asked == []


@pytest.mark.slow
def test_no_second_denoiser_is_loaded_where_its_errors_are_kept(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[str]
) -> None:
    method = {"name": "diffusion_dpo", "beta": 100.0, "num_cached_draws": 1}
    content = pictures(tiny_sd15, tmp_path, "out", method=method, train={"steps": 2 * EPOCH})
    caching.cache(load_recipe(content))
    asked.clear()
    built: list[Any] = []
    build = train.build_policy

    def noted(*given: Any, **named: Any) -> Any:
        built.append(build(*given, **named))
        return built[-1]

    monkeypatch.setattr(train, "build_policy", noted)
    trained(content)
    assert [policy.reference for policy in built] == [None] and asked == []


def test_the_command_says_what_it_wrote_and_a_second_time_that_nothing_is_new(
    vlm_folders: Folders, tiny_sd15: Path, tmp_path: Path, log_lines: list[str]
) -> None:
    for content in (responses(vlm_folders("llava"), tmp_path, "words"), pictures(tiny_sd15, tmp_path, "images")):
        caching.cache(load_recipe(content))
        first = log_lines[-1]
        caching.cache(load_recipe(content))
        second = log_lines[-1]
        folder = f"{content['output']}/cache"
        kinds = ("features", "reference") if "words" in folder else ("latents", "text")
        assert first.startswith(f"cache: {folder}: {kinds[0]} ") and f", {kinds[1]} " in first
        whole = first.partition("; ")[2].partition(" in all")[0]
        assert first.endswith(f"{whole} in all, {whole} of it new")
        assert second.endswith(f"{whole} in all, 0.0 kB of it new")
        useless = [f"{kind}/{path.name}" for kind in kinds for path in Path(folder, kind).iterdir()]
        if "images" in folder:  # latents are float32 in either precision
            useless = useless[1:]
        caching.cache(load_recipe(content, ["train.precision=bfloat16"]))
        assert log_lines[-1].endswith(f" of other settings in {', '.join(useless)}")


def test_random_crops_are_refused_before_a_model_is_loaded(tiny_sd15: Path, tmp_path: Path) -> None:
    content = pictures(tiny_sd15, tmp_path, "out", data={"crop": "random"}, model={"path": "nobody/nothing"})
    with pytest.raises(ValueError, match=r"data\.crop: random is never the same twice"):
        caching.cache(load_recipe(content))
    assert not (tmp_path / "out").exists()


def test_processes_that_do_not_know_of_one_another_are_refused(
    vlm_folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would do all of the work, and keep it as one process's."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("accelerate.Accelerator", lambda: SimpleNamespace(num_processes=1, device=CPU))
    with pytest.raises(ValueError, match="2 processes were started, and each knows of 1: all would work alone"):
        caching.cache(load_recipe(responses(vlm_folders("llava"), tmp_path, "out")))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.slow
def test_a_stop_loses_what_was_not_written_yet(
    vlm_folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precompute, "SHARD", 2)
    content = responses(vlm_folders("llava"), tmp_path, "out")
    make, scored = dpo.contrasts, list[int]()

    def stopping(policy: Any, batch: Any, *more: Any) -> Any:
        if len(scored) == 4:
            raise KeyboardInterrupt
        scored.extend(batch.rows)
        return make(policy, batch, *more)

    monkeypatch.setattr(dpo, "contrasts", stopping)
    with pytest.raises(KeyboardInterrupt):
        caching.cache(load_recipe(content))
    rest: list[int] = []

    def noted(policy: Any, batch: Any, *more: Any) -> Any:
        rest.extend(batch.rows if batch.precomputed is None else [])
        return make(policy, batch, *more)

    monkeypatch.setattr(dpo, "contrasts", noted)
    cached, weights = trained(content)
    assert len(rest) == 4 and not set(rest) & set(scored)
    plain, reference_scores = trained({**content, "output": str(tmp_path / "plain")}, "data.cache='off'")
    assert numbers(cached) == numbers(plain)
    assert_same(weights, reference_scores)


@pytest.mark.slow
def test_going_on_with_more_updates_scores_the_new_pairs_as_one_run_would(vlm_folders: Folders, tmp_path: Path) -> None:
    """By the model as it was loaded, not by the weights that it has learned since."""
    content = responses(vlm_folders("llava"), tmp_path, "parts", model={"tune": "full"})
    trained(content, "train.steps=2")
    _, parts = trained(content, f"train.steps={EPOCH}")
    _, whole = trained({**content, "output": str(tmp_path / "whole")}, f"train.steps={EPOCH}", "data.cache='off'")
    assert_same(parts, whole)


class Numbers:
    """A loader whose pairs are numbers; those that are `bad` have weight 0 where they are read."""

    def __init__(self, sampler: EpochSampler, bad: Sequence[int] = ()) -> None:
        self.sampler, self.bad = sampler, bad

    def __len__(self) -> int:
        return len(self.sampler)

    def key(self, number: int) -> str:
        return f"pair {number}"

    def select_batches(self, epoch: int, some: list[int]) -> Any:
        plan = self.sampler.plan(epoch)
        for number in some:
            rows = [pair for pair, _ in plan[number]]
            weights = torch.tensor([weight * (pair not in self.bad) for pair, weight in plan[number]])
            yield SimpleNamespace(rows=rows, keys=[self.key(row) for row in rows], weights=weights)


def test_processes_score_their_own_batches_and_share_the_held_out_ones(tmp_path: Path) -> None:
    """Two processes that begin at once: no pair is scored twice, and each in the batch that its process will meet."""

    seen: list[tuple[int, int, tuple[int, ...]]] = []
    stores = [
        PrecomputeCache(ArrayCache.open(tmp_path / "kept", {}), PrecomputeSpec(1, {}, scores=True)) for _ in range(2)
    ]
    for rank, store in enumerate(stores):

        def work_out(batch: Any, epoch: int, rank: int = rank) -> dict[str, Tensor]:
            seen.append((rank, epoch, tuple(batch.rows)))
            return {"of": torch.tensor(batch.rows)}

        loader: Any = Numbers(EpochSampler(9, 2, 0, rank, 2))
        steps = store.fill(loader, 6, work_out, rank=rank, world_size=2)
        assert next(steps) == len(list(steps))
    first = [rows for _, epoch, rows in seen if epoch == 0]
    assert sorted(row for rows in first for row in rows) == sorted(EpochSampler(9, 2, 0, 0, 2).order(0)[:8])
    for rank in (0, 1):
        plan = [tuple(pair for pair, _ in batch) for batch in EpochSampler(9, 2, 0, rank, 2).plan(0)]
        assert [rows for who, epoch, rows in seen if (who, epoch) == (rank, 0)] == plan
    assert (
        len(seen) == 5
        and len(PrecomputeCache(ArrayCache.open(tmp_path / "kept", {}), PrecomputeSpec(1, {})).cache) == 9
    )
    # Held-out batches are met by both, and each scores every second one, also if it looks when others are done.
    for folder, late in (("together", False), ("one after the other", True)):
        actual: list[int] = []
        held = [
            PrecomputeCache(ArrayCache.open(tmp_path / folder, {}), PrecomputeSpec(1, {}, scores=True))
            for _ in range(2)
        ]
        for rank, store in enumerate(held):
            if late:
                store.cache.refresh()
            steps = store.fill(
                Numbers(EpochSampler(9, 2, 0)),  # type: ignore[arg-type]
                4,
                lambda batch, _, ours=actual: ours.extend(batch.rows) or {"of": torch.tensor(batch.rows)},
                rank=rank,
                world_size=2,
                shared=False,
            )
            assert sum(1 for _ in steps) == 1 + 2
        assert len(actual) == len(set(actual)) == 8


@pytest.mark.parametrize("seed", range(8))
def test_batches_that_are_of_no_use_are_made_up_for_whoever_met_the_bad_pairs(seed: int, tmp_path: Path) -> None:
    """Two of five pairs are bad, and two processes go on until they have made four updates together."""
    steps, bad = 4, (2, 3)
    loaders: list[Any] = [Numbers(EpochSampler(5, 1, seed, rank, 2), bad) for rank in (0, 1)]
    stores = [PrecomputeCache(ArrayCache.open(tmp_path, {}), PrecomputeSpec(1, {}, scores=True)) for _ in loaders]

    def fill(batches: int) -> None:
        for rank, (store, loader) in enumerate(zip(stores, loaders, strict=True)):
            scored = store.fill(loader, batches, lambda b, _: {"of": torch.tensor(b.rows)}, rank=rank, world_size=2)
            assert next(scored) == len(list(scored))
        for store in stores:
            store.cache.refresh()

    planned = steps
    fill(planned)
    while planned < (
        more := steps + min(s.count_empty_batches(x, planned) for s, x in zip(stores, loaders, strict=True))
    ):
        planned = more
        fill(planned)
    there, updates = set(stores[0].cache), 0
    for epoch in range(steps * 2):
        for index in range(len(loaders[0])):
            met = {loader.sampler.plan(epoch)[index][0][0] for loader in loaders} - {*bad}
            if updates < steps and met:
                updates += 1
                assert {stores[0].key(f"pair {pair}", epoch) for pair in met} <= there
    assert updates == steps


def test_what_cannot_be_kept_is_refused_or_not_kept() -> None:
    for tokens in ("own", "policy"):
        with pytest.raises(
            ValueError, match="num_cached_draws: 2 keeps noisy tokens, and a policy that learns would not"
        ):
            povid.Config(num_cached_draws=2, tokens=tokens)  # type: ignore[arg-type]
    configs: list[Any] = [povid.Config(), mdpo.Config(), bdhs.Config(mode="online"), bdhs.Config(mode="mixed")]
    assert [requirements_of(config).precompute for config in configs] == [None] * 4


def test_a_cache_that_is_off_is_not_filled(vlm_folders: Folders, tmp_path: Path) -> None:
    content = responses(vlm_folders("llava"), tmp_path, "out")
    with pytest.raises(ValueError, match=r"data\.cache: off keeps nothing; leave it out, or name a folder"):
        caching.cache(load_recipe(content, ["data.cache='off'"]))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data\.cache: .*file is a file; expected a folder"):
        caching.cache(load_recipe(content, [f"data.cache={tmp_path}/file"]))


def test_a_score_that_is_missing_is_an_error_where_nothing_else_can_give_it(tmp_path: Path) -> None:
    batch: Any = SimpleNamespace(keys=["a", "b"], weights=torch.tensor([1.0, 0.0]))
    cache = ArrayCache.open(tmp_path / "kept", {})
    with pytest.raises(ValueError, match="lacks what the reference scores in a batch of epoch 3, and nothing else in"):
        PrecomputeCache(cache, PrecomputeSpec(1, {}, scores=True), required=True).lookup(batch, 3, CPU)
    assert PrecomputeCache(cache, PrecomputeSpec(1, {}, scores=True)).lookup(batch, 3, CPU) is None
    cache.put({"a/0": {"x": torch.tensor([1, 2])}, "c/0": {"x": torch.tensor([1, 2, 3])}})
    results = PrecomputeCache(cache, PrecomputeSpec(1, {}), required=True).lookup(batch, 3, CPU)
    assert results is not None and results["x"].tolist() == [[1, 2], [0, 0]]
    both: Any = SimpleNamespace(keys=["a", "c"], weights=torch.ones(2))
    assert PrecomputeCache(cache, PrecomputeSpec(1, {})).lookup(both, 0, CPU)["x"].tolist() == [[1, 2, 0], [1, 2, 3]]  # type: ignore[index]
    nobody: Any = SimpleNamespace(keys=["b"], weights=torch.zeros(1))
    assert PrecomputeCache(cache, PrecomputeSpec(1, {}), required=True).lookup(nobody, 0, CPU) is not None


def test_the_fingerprint_is_written_beside_the_scores(vlm_folders: Folders, tmp_path: Path) -> None:
    content = responses(vlm_folders("llava"), tmp_path, "out")
    caching.cache(load_recipe(content))
    (path,) = (tmp_path / "out" / "cache" / "reference").glob("*/fingerprint.json")
    output = json.loads(path.read_text())
    assert output["method"] == "dpo" and output["executor"] == "cpu float32, mmalign_sdpa, sdpa"
    assert output["precision"] == "float32" and output["pack"] == "auto"
    assert output["pairs"] == 8 and output["batch_size"] == 2 and output["processes"] == 1 and output["seed"] == 0
