"""Training from full caches: the same losses, one network in memory, and nothing from another's cache."""

import io
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from mmalign.commands import cache as caching
from mmalign.commands import train
from mmalign.commands.load_recipe import load_recipe
from mmalign.data.caches import fill
from mmalign.data.caches.array_cache import ArrayCache
from mmalign.data.caches.precompute import PrecomputeCache, PrecomputeSpec
from mmalign.families.vlm.model import ImageTextToText
from mmalign.methods import requirements_of
from mmalign.methods.vision_language import bdhs, dpo, mdpo, povid
from tests.helpers import Folders, data_files, first_fast
from tests.helpers.runs import (
    BOUND,
    EPOCH,
    assert_close,
    assert_resumes,
    assert_same,
    numbers,
    pictures,
    responses,
    trained,
)

CPU = torch.device("cpu")

# What keeps the reference's scores, with the settings that it needs for it.
KEEPING: dict[str, dict[str, Any]] = {
    "dpo": {},
    "rlhfv": {},
    "realign": {},
    "mdpo": {"num_cached_draws": 2},
    "povid": {"num_cached_draws": 2, "tokens": "reference"},
    "bdhs": {},
}


@pytest.fixture
def no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen copy is an error."""
    monkeypatch.setattr(ImageTextToText, "frozen_copy", lambda _: pytest.fail("the network was copied"))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "tune"), [*((name, "full") for name in KEEPING), ("dpo", "lora")])
def test_cached_scores_change_losses_by_rounding_only(
    method: str, tune: str, vlm_folders: Folders, tmp_path: Path
) -> None:
    """Two cycles of all draws; validation pairs are scored, and contrasts accumulated."""
    draws = KEEPING[method].get("num_cached_draws", 1)
    sections: dict[str, Any] = {
        "method": {"name": method, **KEEPING[method]},
        "model": {"tune": tune},
        "data": {"format": "realign", "validation_fraction": 0.3},
        "train": {"steps": 4 * draws, "gradient_accumulation_steps": 1, "save_every": 2},
    }
    model = vlm_folders("llava")
    cached, _ = trained(responses(model, tmp_path, "cached", **sections))
    plain, _ = trained(responses(model, tmp_path, "plain", **sections), "data.cache='off'")
    assert_close(cached, plain)
    assert list((tmp_path / "cached" / "cache" / "reference").rglob("*.safetensors"))
    assert not (tmp_path / "plain" / "cache").exists()


@pytest.mark.slow
@pytest.mark.parametrize("method", KEEPING)
def test_loss_of_the_first_update_is_ln_2(method: str, vlm_folders: Folders, tmp_path: Path, no_copy: None) -> None:
    """Each term is, to the rounding of a score."""
    sections: dict[str, Any] = {"method": {"name": method, **KEEPING[method]}, "model": {"tune": "full"}}
    sections["train"] = {"steps": 1, "save_every": 1, "batch_size": 4}
    done, _ = trained(responses(vlm_folders("llava"), tmp_path, "out", **sections))
    (first,) = done.history
    ln2 = math.log(2)
    terms = [value for name, value in first.items() if name.endswith("loss") and name != "loss"] or [first["loss"]]
    assert first["logit"] == pytest.approx(0, abs=BOUND) and first["chosen gain"] == pytest.approx(0, abs=BOUND)
    assert all(min(abs(value - ln2), abs(value - ln2 / 2)) < BOUND for value in terms)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "tune"), [("diffusion_dpo", "lora"), ("instruct_engine", "full")])
def test_cached_draws_change_nothing_until_they_repeat(method: str, tune: str, tiny_sd15: Path, tmp_path: Path) -> None:
    """Against a run without the option, which draws anew: two epochs agree to rounding, the third has other draws."""
    sections: dict[str, Any] = {
        "model": {"tune": tune},
        "data": {"flip": True},
        "train": {"steps": 2 * EPOCH, "save_every": EPOCH},
    }
    data_files.pick_a_pic(tmp_path / "pairs.parquet", rejected={} if method == "instruct_engine" else None)
    plain = pictures(tiny_sd15, tmp_path, "plain", **sections, method={"name": method, "beta": 100.0})
    banked = {"name": method, "beta": 100.0, "num_cached_draws": 2}
    cached = pictures(tiny_sd15, tmp_path, "cached", **sections, method=banked)
    weights = trained(cached)[0]
    assert_close(weights, trained(plain)[0])
    assert weights.history[0]["loss"] == pytest.approx(math.log(2), abs=BOUND)
    more = f"train.steps={3 * EPOCH}"
    with pytest.raises(AssertionError):
        assert_close(trained(cached, more)[0], trained(plain, more)[0])


@pytest.mark.slow
def test_cached_run_resumes_bit_for_bit(vlm_folders: Folders, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"method": {"name": "povid", **KEEPING["povid"]}, "model": {"tune": "full"}}
    assert_resumes(responses(vlm_folders("llava"), tmp_path, "out", **sections, train={"steps": 6, "save_every": 3}))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["responses", "images"])
def test_cache_serves_every_batch_size(
    kind: str, vlm_folders: Folders, tiny_sd15: Path, tmp_path: Path, asked: list[str]
) -> None:
    """Scores computed four pairs at a time are those of a run with eight, and of one with fewer pairs."""
    options = {"steps": 4, "batch_size": 4}
    if kind == "responses":
        content = responses(vlm_folders("llava"), tmp_path, "out", train=options)
    else:
        method = {"name": "diffusion_dpo", "beta": 100.0, "num_cached_draws": 2}
        content = pictures(tiny_sd15, tmp_path, "out", train=options, method=method)
    caching.cache(load_recipe(content))
    assert len(asked) == (2 if kind == "responses" else 4)  # two batches of each draw
    asked.clear()
    for override in ("train.batch_size=8", "data.limit=5", "train.batch_size=1"):
        caching.cache(load_recipe(content, [override]))
    cached, _ = trained(content, "train.batch_size=8")
    assert asked == []
    plain, _ = trained({**content, "output": str(tmp_path / "plain")}, "train.batch_size=8", "data.cache='off'")
    assert_close(cached, plain)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_unreadable_pairs_keep_their_places(seed: int, vlm_folders: Folders, tmp_path: Path) -> None:
    """Batches without a usable pair make no update, so training reads further ones; their scores are cached as well."""
    model, sections = vlm_folders("llava"), {"model": {"tune": "full"}, "train": {"steps": 3, "batch_size": 1}}
    content = responses(model, tmp_path, "cached", **sections)
    for name in ("0.png", "2.png"):
        (tmp_path / "rows" / name).write_bytes(b"no picture")
    cached, _ = trained(content, f"train.seed={seed}")
    plain, _ = trained({**content, "output": str(tmp_path / "plain")}, f"train.seed={seed}", "data.cache='off'")
    assert_close(cached, plain)


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
def test_cached_scores_need_no_reference(
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


@pytest.mark.slow
def test_cache_reports_writes_and_then_nothing_new(
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


@pytest.mark.slow
def test_random_crops_cache_text_alone(tiny_sd15: Path, tmp_path: Path) -> None:
    content = pictures(tiny_sd15, tmp_path, "out", data={"crop": "random"})
    folder = caching.cache(load_recipe(content))
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["text"]
    cached, _ = trained(content)
    assert_close(cached, trained({**content, "output": str(tmp_path / "plain")}, "data.cache='off'")[0])


def resized(data: bytes, size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).resize(size).save(buffer, "PNG")
    return buffer.getvalue()


SHAPES: dict[str, dict[str, Any]] = {
    "buckets": {"fit": "buckets", "flip": True},
    "pad": {"fit": "pad"},
    "wide": {"resolution": "24x16"},
}


@pytest.mark.slow
@pytest.mark.parametrize("shape", first_fast(SHAPES))
def test_cached_shapes_equal_decoded_ones(shape: str, tiny_sd15: Path, tmp_path: Path) -> None:
    sections: dict[str, Any] = {"data": {"resolution": 16, **SHAPES[shape]}, "train": {"steps": 3, "batch_size": 2}}
    path = data_files.pick_a_pic(tmp_path / "pairs.parquet")
    rows = pq.read_table(path).to_pylist()
    for number, row in enumerate(rows):
        size = ((48, 16), (20, 40), (24, 24))[number % 3]
        row |= {side: resized(row[side], size) for side in ("jpg_0", "jpg_1")}
    pq.write_table(pa.Table.from_pylist(rows), path)
    cached, _ = trained(pictures(tiny_sd15, tmp_path, "cached", **sections))
    assert_close(cached, trained(pictures(tiny_sd15, tmp_path, "plain", **sections), "data.cache='off'")[0])
    square, _ = trained(pictures(tiny_sd15, tmp_path, "square", **sections), "data.resolution=16", "data.fit=crop")
    assert square.history[0]["chosen error"] != pytest.approx(cached.history[0]["chosen error"], abs=BOUND)


def test_processes_that_do_not_know_of_one_another_are_refused(
    vlm_folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would do all of the work, and keep it as one process's."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("accelerate.Accelerator", lambda **_: SimpleNamespace(num_processes=1, device=CPU))
    with pytest.raises(ValueError, match="2 processes were launched, but accelerate connects 1"):
        caching.cache(load_recipe(responses(vlm_folders("llava"), tmp_path, "out")))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.slow
def test_stopped_fill_resumes_where_it_stopped(
    vlm_folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch whose scores are written is not scored again; the result is that of a run that never stopped."""
    monkeypatch.setattr(fill, "SHARD_ITEMS", 3)
    content = responses(vlm_folders("llava"), tmp_path, "out")
    make, scored = dpo.contrasts, list[int]()

    def stopping(policy: Any, batch: Any, *more: Any) -> Any:
        if len(scored) == 6:
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
    stopped, weights = trained(content)
    assert len(rest) == 4 and not set(rest) & set(scored[:4])  # the last scores were not written yet
    whole, expected = trained({**content, "output": str(tmp_path / "whole")})
    assert numbers(stopped) == numbers(whole)
    assert_same(weights, expected)


@pytest.mark.slow
def test_new_pairs_of_a_longer_run_are_scored_by_the_base_model(vlm_folders: Folders, tmp_path: Path) -> None:
    """By the model as it was loaded, not by the weights that it has learned since."""
    content = responses(vlm_folders("llava"), tmp_path, "parts", model={"tune": "full"})
    trained(content, "train.steps=2")
    parts, _ = trained(content, f"train.steps={EPOCH}")
    whole, _ = trained({**content, "output": str(tmp_path / "whole")}, f"train.steps={EPOCH}", "data.cache='off'")
    assert_close(parts, whole)


def test_what_cannot_be_kept_is_refused_or_not_kept() -> None:
    for tokens in ("own", "policy"):
        with pytest.raises(ValueError, match="num_cached_draws: 2 cannot be cached, since the policy"):
            povid.Config(num_cached_draws=2, tokens=tokens)  # type: ignore[arg-type]
    configs: list[Any] = [povid.Config(), mdpo.Config(), bdhs.Config(mode="online"), bdhs.Config(mode="mixed")]
    assert [requirements_of(config).precompute for config in configs] == [None] * 4


def test_a_cache_that_is_off_is_not_filled(vlm_folders: Folders, tmp_path: Path) -> None:
    content = responses(vlm_folders("llava"), tmp_path, "out")
    with pytest.raises(ValueError, match=r"data\.cache: off writes no cache; leave it out, or give a folder"):
        caching.cache(load_recipe(content, ["data.cache='off'"]))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data\.cache: .*file is a file; choose a folder"):
        caching.cache(load_recipe(content, [f"data.cache={tmp_path}/file"]))


def test_missing_cached_score_without_reference_is_an_error(tmp_path: Path) -> None:
    cache = ArrayCache.open(tmp_path / "kept", {})
    scores = PrecomputeSpec(1, {}, scores=True)
    weights = torch.tensor([1.0, 0.0])
    with pytest.raises(ValueError, match="lacks what the reference scores in a batch of epoch 3, and nothing else in"):
        PrecomputeCache(cache, scores, required=True).lookup(["a", "b"], weights, 3, CPU)
    assert PrecomputeCache(cache, scores).lookup(["a", "b"], weights, 3, CPU) is None
    cache.put({"a/0": {"x": torch.tensor([1, 2])}, "c/0": {"x": torch.tensor([1, 2, 3])}})
    required = PrecomputeCache(cache, scores, required=True)
    for pairs, values in ((["a", "b"], [[1, 2], [0, 0]]), (["a", "c"], [[1, 2, 0], [1, 2, 3]]), (["b"], [[0, 0]])):
        results = required.lookup(pairs, torch.tensor([float(pair != "b") for pair in pairs]), 3, CPU)
        assert results is not None and results["x"].tolist() == values


def test_the_fingerprint_is_written_beside_the_scores(vlm_folders: Folders, tmp_path: Path) -> None:
    content = responses(vlm_folders("llava"), tmp_path, "out")
    caching.cache(load_recipe(content))
    (path,) = (tmp_path / "out" / "cache" / "reference").glob("*/fingerprint.json")
    output = json.loads(path.read_text())
    assert output["method"] == "dpo" and output["attention"] == "cpu float32, mmalign_sdpa, sdpa"
    assert output["precision"] == "float32" and output["pack"] == "auto"
    assert output["seed"] == 0 and not {"batch_size", "processes", "pairs"} & output.keys()
