"""What a method keeps of pairs, seen on InPO's inversions: the same bits, worked out once, unseen by strangers."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmalign.config import ImageSize
from mmalign.data.caches import fill
from mmalign.data.caches.array_cache import ArrayCache
from mmalign.data.caches.precompute import PrecomputeCache, PrecomputeSpec
from mmalign.data.formats.images import open_pairs
from mmalign.data.images import ImageTransform
from mmalign.data.loaders.image_pairs import ImagePairLoader, ImagePairReader
from mmalign.data.loaders.loader import Loader
from mmalign.data.loaders.sampler import EpochSampler
from mmalign.data.shapes import Shapes
from mmalign.methods import epoch_rng
from mmalign.methods.text_to_image import inpo
from mmalign.rng import KeyedRNG
from mmalign.training.loop import make_contrasts
from tests.helpers import data_files, first_fast, recipes
from tests.helpers.image_batches import pairs
from tests.helpers.loading import load_diffusion
from tests.helpers.policies import full
from tests.helpers.runs import assert_close, assert_same, train_weights, trained

METHOD = {"name": "inpo", "inverter": "reference", "num_cached_draws": 2, "steps": 3, "beta": 100.0}
STEPS = 10  # eight pairs by two: the third epoch begins with the ninth batch


def recipe(folder: Path, tmp_path: Path, output: str, /, **sections: Any) -> dict[str, Any]:
    given = {"method": METHOD, "data": {"flip": True}, "train": {"steps": STEPS, "save_every": 5}, **sections}
    source = tmp_path / "pairs.parquet"
    return recipes.diffusion(
        folder, source if source.exists() else data_files.pick_a_pic(source), tmp_path / output, **given
    )


@pytest.fixture
def worked_out(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(row, epoch of the draws) of every pair that is inverted, by the kept or by the usual way."""
    seen: list[tuple[int, int]] = []
    invert = inpo.invert_pairs

    def noted(policy: Any, batch: Any, clean: Any, cfg: Any, rng: KeyedRNG) -> Tensor:
        seen.extend((row, rng.epoch) for row in batch.rows)
        return invert(policy, batch, clean, cfg, rng)

    monkeypatch.setattr(inpo, "invert_pairs", noted)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("tune", first_fast(["lora", "full"]))
def test_cache_changes_rounding_only_and_computes_each_draw_once(
    tune: str, tiny_sd15: Path, tmp_path: Path, worked_out: list[tuple[int, int]]
) -> None:
    """Mirrored pairs, held-out pairs, and an epoch whose draws have been before; then a run of other settings."""
    common: dict[str, Any] = {"model": {"tune": tune}, "data": {"flip": True, "validation_fraction": 0.5}}
    cached, weights = trained(recipe(tiny_sd15, tmp_path, "cached", **common))
    assert len(worked_out) == len(set(worked_out)) and {epoch for _, epoch in worked_out} == {0, 1}
    once = len(worked_out)
    worked_out.clear()
    assert_close(cached, trained(recipe(tiny_sd15, tmp_path, "plain", **common), "data.cache='off'")[0])
    assert len(worked_out) > once
    worked_out.clear()
    there = f"data.cache='{tmp_path / 'cached' / 'cache'}'"
    assert_same(weights, train_weights(recipe(tiny_sd15, tmp_path, "again", **common), there, "data.num_workers=2"))
    other_weights = train_weights(
        recipe(tiny_sd15, tmp_path, "other", **common), there, "method.beta=300.0", "train.batch_size=1"
    )
    assert worked_out == [] and not torch.equal(*(next(iter(x.values())) for x in (weights, other_weights)))


@pytest.mark.slow
def test_what_was_written_before_a_stop_is_not_worked_out_again(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worked_out: list[tuple[int, int]]
) -> None:
    monkeypatch.setattr(fill, "SHARD_ITEMS", 5)
    noted = inpo.invert_pairs

    def stopping(*given: Any) -> Tensor:
        if len(worked_out) == 8:
            raise KeyboardInterrupt
        return noted(*given)

    monkeypatch.setattr(inpo, "invert_pairs", stopping)
    content = recipe(tiny_sd15, tmp_path, "stopped")
    with pytest.raises(KeyboardInterrupt):
        train_weights(content)
    monkeypatch.setattr(inpo, "invert_pairs", noted)
    weights = train_weights(content)
    assert len(set(worked_out)) == 16 and len(worked_out) == 16 + 2  # two of a shard that was not full
    assert_same(weights, train_weights(recipe(tiny_sd15, tmp_path, "whole")))


def test_only_pairs_that_the_run_meets_are_worked_out(
    tiny_sd15: Path, tmp_path: Path, worked_out: list[tuple[int, int]]
) -> None:
    train_weights(
        recipe(tiny_sd15, tmp_path, "short", train={"steps": 1, "gradient_accumulation_steps": 2, "save_every": 1})
    )
    assert len(worked_out) == 4


def moved(model: Path, folder: Path) -> Path:
    """The same encoders with another denoiser."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    with torch.no_grad():
        pipe.unet.conv_in.bias.add_(0.1)
    pipe.save_pretrained(folder)
    return folder


OTHERS = {
    "steps": ["method.steps=4"],
    "eta": ["method.eta=0.0"],
    "seed": ["train.seed=1"],
    "flip": ["data.flip=false"],
    "resolution": ["data.resolution=24"],
    "precision": ["train.precision=bfloat16"],
}


@pytest.mark.slow
@pytest.mark.parametrize("override", first_fast([*OTHERS, "weights", "schedule", "prediction", "tokenizer"]))
def test_what_was_made_otherwise_is_worked_out_anew_beside_it(
    override: str, tiny_sd15: Path, tmp_path: Path, worked_out: list[tuple[int, int]]
) -> None:
    """In one folder of caches; both are found again, and training is what it is in a folder of its own."""
    options = {"steps": 1, "save_every": 1}
    first = recipe(
        tiny_sd15, tmp_path, "first", train=options, data={"flip": True, "limit": 2, "cache": f"{tmp_path}/all"}
    )
    train_weights(first)
    overrides = OTHERS.get(override, [f"model.path={tmp_path / 'other'}"])
    if override not in OTHERS:
        changed(override, tiny_sd15, tmp_path / "other")
    worked_out.clear()
    shared = train_weights({**first, "output": str(tmp_path / "second")}, *overrides)
    assert len(worked_out) == 2
    alone = train_weights({**first, "output": str(tmp_path / "third")}, *overrides, f"data.cache={tmp_path}/own")
    assert_same(shared, alone)
    worked_out.clear()
    train_weights({**first, "output": str(tmp_path / "fourth")}, *overrides)
    train_weights({**first, "output": str(tmp_path / "fifth")})
    assert worked_out == [] and len(list((tmp_path / "all" / "kept").iterdir())) == 2


def changed(what: str, model: Path, folder: Path) -> None:
    """The same model, but for one thing."""
    shutil.copytree(model, folder)
    if what == "weights":
        moved(model, folder)
    elif what == "tokenizer":
        file = folder / "tokenizer" / "tokenizer.json"
        output = json.loads(file.read_text())
        words = output["model"]["vocab"]
        words["a</w>"], words["e</w>"] = words["e</w>"], words["a</w>"]
        file.write_text(json.dumps(output))
    else:
        file = folder / "scheduler" / "scheduler_config.json"
        new = {"schedule": {"beta_end": 0.02}, "prediction": {"prediction_type": "v_prediction"}}[what]
        file.write_text(json.dumps(json.loads(file.read_text()) | new))


@pytest.mark.slow
def test_a_pair_with_a_bad_image_keeps_its_place_without_weight(tiny_sd15: Path, tmp_path: Path) -> None:
    data_files.pick_a_pic(tmp_path / "pairs.parquet", bad={3: b"no image"})
    cached, _ = trained(recipe(tiny_sd15, tmp_path, "cached"))
    assert_close(cached, trained(recipe(tiny_sd15, tmp_path, "plain"), "data.cache='off'")[0])


def loader(tmp_path: Path, **more: Any) -> ImagePairLoader:
    data_files.pick_a_pic(tmp_path / "pairs.parquet", 7)
    source = open_pairs("pick_a_pic", str(tmp_path / "pairs.parquet"))
    reader = ImagePairReader(Shapes((ImageSize(16, 16),), {}), ImageTransform(flip=True), seed=0, repeat=2)
    return Loader(source, reader, batch_size=2, seed=0, **more)


class OneOf:
    """The process with this rank, of two; it waits for nobody."""

    num_processes, is_main_process = 2, False

    def __init__(self, rank: int) -> None:
        self.process_index = rank

    def wait_for_everyone(self) -> None:
        pass


def fill_as(rank: int, own: PrecomputeCache, numbers: Any, num_batches: int) -> None:
    """Fill the share of one of two processes; a pair's tensor is its row and draw."""

    def compute(batch: Any, epoch: int) -> dict[str, Tensor]:
        return {"of": torch.tensor([[row % 1000, epoch] for row in batch.rows])}

    missing = own.missing(own.required_keys(numbers, num_batches), rank=rank, world_size=2)
    fill.fill(own.cache, own.compute(numbers, missing, compute), 0, "", OneOf(rank))


def test_processes_share_the_work_and_each_finds_all_of_it(tmp_path: Path) -> None:
    """Two processes that begin at once, with a batch of two pairs each in an epoch: nothing is worked out twice."""
    store, shares = tmp_path / "kept", list[set[str]]()
    ranks = [PrecomputeCache(ArrayCache.open(store, {}), PrecomputeSpec(2, {})) for _ in (0, 1)]
    for rank, own in enumerate(ranks):
        before = set(ArrayCache.open(store, {}))
        fill_as(rank, own, loader(tmp_path, rank=rank, world_size=2), 4)
        shares.append(set(own.cache) - before)
    assert len(shares[0]) == len(shares[1]) == 7 and not shares[0] & shares[1]
    assert shares[0] | shares[1] == set(ranks[0].required_keys(loader(tmp_path, world_size=2), 4))
    for rank in (0, 1):
        result = PrecomputeCache(ArrayCache.open(store, {}), PrecomputeSpec(2, {}))
        for epoch in (0, 1, 2, 3):
            for batch in loader(tmp_path, rank=rank, world_size=2).batches(epoch):
                arrays = result.lookup(batch.keys, batch.weights, epoch, torch.device("cpu"))
                assert arrays is not None
                assert arrays["of"].tolist() == [[row % 1000, epoch % 2] for row in batch.rows]


class Numbers:
    """A loader whose pairs are numbers; those that are `bad` have weight 0 where they are read."""

    def __init__(self, sampler: EpochSampler, bad: Sequence[int] = ()) -> None:
        self.sampler, self.bad = sampler, bad

    def key(self, number: int) -> str:
        return f"pair {number}"

    def read_pairs(self, epoch: int, numbers: Sequence[int]) -> Iterator[Any]:
        for number in numbers:
            weights = torch.tensor([float(number not in self.bad)])
            yield SimpleNamespace(rows=[number], keys=[self.key(number)], weights=weights)


@pytest.mark.parametrize("seed", range(8))
def test_further_batches_replace_those_of_bad_pairs(seed: int, tmp_path: Path) -> None:
    """Two of five pairs are bad, and two processes go on until they have made two updates together."""
    steps, bad = 2, (2, 3)
    loaders: list[Any] = [Numbers(EpochSampler(5, 1, seed, rank, 2), bad) for rank in (0, 1)]
    own = PrecomputeCache(ArrayCache.open(tmp_path, {}), PrecomputeSpec(4, {}, scores=True))
    planned, needed = 0, steps
    while planned < needed:
        planned = needed
        for rank in (0, 1):
            fill_as(rank, own, loaders[0], planned)
        needed = own.num_batches_read(loaders[0], own.required_keys(loaders[0], planned), steps)
    updates = 0
    for epoch in range(4):
        for index in range(len(loaders[0].sampler)):
            met = {loader.sampler.plan(epoch)[index][0][0] for loader in loaders} - {*bad}
            if updates < steps and met:
                updates += 1
                assert {own.key(f"pair {pair}", epoch) for pair in met} <= set(own.cache)
    assert updates == steps


def test_a_batch_of_which_a_pair_lacks_finds_nothing(tmp_path: Path) -> None:
    own = PrecomputeCache(ArrayCache.open(tmp_path / "kept", {}), PrecomputeSpec(1, {}))
    (batch, *_) = loader(tmp_path).batches(0)
    own.cache.put({own.key(batch.keys[0], 0): {"x": torch.ones(3)}})
    assert own.lookup(batch.keys, batch.weights, 0, torch.device("cpu")) is None
    batch.weights[1] = 0.0
    arrays = own.lookup(batch.keys, batch.weights, 0, torch.device("cpu"))
    assert arrays is not None and arrays["x"].tolist() == [[1.0] * 3, [0.0] * 3]


def test_crops_and_flips_repeat_with_the_draws(tmp_path: Path) -> None:
    repeating = loader(tmp_path)
    pixels: dict[int, dict[int, Tensor]] = {epoch: {} for epoch in range(3)}
    for epoch, by_row in pixels.items():
        for batch in repeating.read_pairs(epoch, range(7)):
            assert batch.pixels is not None
            by_row |= {row: batch.pixels[i :: len(batch.rows)] for i, row in enumerate(batch.rows)}
    assert all(torch.equal(pixels[0][row], pixels[2][row]) for row in pixels[0])
    assert not all(torch.equal(pixels[0][row], pixels[1][row]) for row in pixels[0])
    for batch in repeating.batches(1):
        assert batch.pixels is not None
        assert all(torch.equal(pixels[1][row], batch.pixels[i::2]) for i, row in enumerate(batch.rows))


@pytest.fixture
def contrast(tiny_sd15: Path) -> Callable[[int], Any]:
    family = load_diffusion(tiny_sd15)
    policy, cfg = full(family, moved=0.02), inpo.Config(**METHOD)  # type: ignore[arg-type]

    @torch.no_grad()
    def made(epoch: int) -> Any:
        rng = epoch_rng(inpo.requirements(cfg).precompute, KeyedRNG(5, epoch))
        return make_contrasts(inpo, policy, pairs(family), cfg, rng)[0]

    return made


def test_draws_come_again_after_their_number_of_epochs(contrast: Callable[[int], Any]) -> None:
    first, second, again = (contrast(epoch) for epoch in (0, 1, 2))
    for name in ("x_t", "t", "target"):
        assert torch.equal(getattr(first.view, name), getattr(again.view, name))
    assert torch.equal(first.reference["chosen"], again.reference["chosen"])
    assert not torch.equal(first.view.t, second.view.t)


def test_only_the_reference_s_inversions_can_be_kept() -> None:
    with pytest.raises(ValueError, match="num_cached_draws: 2 cannot be cached, since the inverter"):
        inpo.Config(num_cached_draws=2)
