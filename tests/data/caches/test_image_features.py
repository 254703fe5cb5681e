"""Features of images that are kept: the same bits through the disk, and a vision tower that is away."""

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from mmalign.commands import cache
from mmalign.commands import train as training
from mmalign.commands.load_recipe import load_recipe
from mmalign.commands.train import train
from mmalign.data.caches import image_features
from mmalign.data.caches.array_cache import ArrayCache
from mmalign.data.loaders import response_pairs
from mmalign.data.pairs import ImageRef
from mmalign.families.loading import load_vision_language
from mmalign.families.types import Loading
from mmalign.families.vlm.image_features import frozen_parts, pack_features, unpack_features
from mmalign.families.vlm.model import ImageTextToText
from mmalign.language.chat import Turn
from mmalign.methods.vision_language import povid
from tests.helpers import STANDING_VLMS, Folders, data_files, first_fast, vlm_models, vlm_reference
from tests.helpers.runs import EPOCH, assert_close, assert_same, numbers, responses, trained

CPU = torch.device("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("name", first_fast(STANDING_VLMS))
def test_the_tower_is_put_away_and_not_missed(
    name: str, vlm_folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are where nothing can be computed with them, and the losses are what they were."""
    content = responses(vlm_folders(name), tmp_path, "there", data={"format": "realign", "validation_fraction": 0.3})
    there, weights = trained(content)
    gone: list[torch.nn.Module] = []

    def lost(module: torch.nn.Module, device: torch.device) -> None:
        gone.append(module.to("meta"))

    monkeypatch.setattr(cache, "move_parameters", lost)
    away, reference_scores = trained({**content, "output": str(tmp_path / "away")})
    assert numbers(there) == numbers(away)
    assert_same(weights, reference_scores)
    family: Any = load_vision_language(str(vlm_folders(name)), Loading(CPU))
    left = sum(p.numel() for p in family.network.parameters()) - sum(p.numel() for m in gone for p in m.parameters())
    learning = (family._model.get_decoder(), family._model.get_output_embeddings())
    decoder = {id(p): p.numel() for part in learning for p in part.parameters()}
    bare = sum(p.numel() for _, p in family._model.base_model.named_parameters(recurse=False))
    assert gone and left == sum(decoder.values()) + bare


@pytest.mark.slow
@pytest.mark.parametrize(("size", "bad"), [(2, ["0.png"]), (1, ["0.png"])])
def test_unreadable_pair_does_not_reload_the_tower(
    size: int, bad: list[str], vlm_folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A good pair of the batch stands in for it; and where there is none, one whose features are kept for that."""
    content = responses(vlm_folders("llava"), tmp_path, "out", train={"steps": 1, "batch_size": size})
    for name in bad:
        (tmp_path / "rows" / name).write_bytes(b"no picture")
    monkeypatch.setattr(cache, "move_parameters", lambda module, device: module.to("meta"))
    encode, seen = training.DataModule._encoded, list[tuple[int, Any]]()

    def noted(self: Any, loader: Any, epoch: int, start: int) -> Any:
        for batch in encode(self, loader, epoch, start):
            seen.append((int(batch.weights.sum()), batch))
            yield batch

    monkeypatch.setattr(training.DataModule, "_encoded", noted)
    train(load_recipe(content))
    counted = [number for number, _ in seen]
    assert (0 in counted) if size == 1 else (1 in counted)


@pytest.mark.slow
def test_the_tower_stays_for_pictures_that_no_file_has(
    vlm_folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Crops, which the policy looks at, and noise while it is drawn anew; kept noise was looked at before."""
    monkeypatch.setattr(cache, "move_parameters", lambda *_: pytest.fail("the tower was put away"))
    for name, method in enumerate([{"name": "mdpo", "num_cached_draws": 1}, {"name": "mdpo"}, {"name": "povid"}]):
        trained(responses(vlm_folders("llava"), tmp_path, str(name), method=method, train={"steps": 2}))
    assert not povid.requirements(povid.Config(num_cached_draws=1, tokens="reference")).vision_tower


@pytest.mark.parametrize("name", first_fast([*vlm_models.BUILDERS, *vlm_models.NEWER], 2))
def test_kept_features_are_the_features(name: str, vlm_folders: Folders, tmp_path: Path) -> None:
    """Through the disk, for every type: a decoder gives the same bits."""
    family: Any = load_vision_language(str(vlm_folders(name)), Loading(CPU))
    views = {key: family.processor.preprocess_image(vlm_reference.PICTURES[key]) for key in ("wide", "tall")}
    live = family.encode_images(views)
    store = ArrayCache.open(tmp_path / "features", image_features.feature_dependencies(family))
    for key, arrays in family.features_as_tensors(live).items():
        store.put({key: {image_features.IDS: torch.tensor(views[key].ids), **arrays}})
    known = {key: image_features.cached_view(store, key) for key in views}
    assert all(known[key].ids == view.ids and not known[key].tensors for key, view in views.items())  # type: ignore[union-attr]
    turns = [Turn("user", "<image>What is it?")]
    rows = [
        row
        for key, view in views.items()
        for row in family.processor.tokenize_responses(turns, ["A dog.", "A"], [(key, view)])
    ]
    tokens = family.processor.collate(rows)
    with torch.no_grad():
        actual, expected = (
            family.token_logps(family.network, tokens, result) for result in (family.encode_images(known), live)
        )
    assert torch.equal(actual, expected)
    assert not [
        key
        for key, one in live.images.items()
        if pack_features(unpack_features(pack_features(one), CPU)).keys() != pack_features(one).keys()
    ]


@pytest.mark.slow
def test_an_image_is_encoded_once_and_not_prepared_again(
    vlm_folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four images of eight pairs, in two runs."""
    encoded: list[Any] = []
    encode = ImageTextToText._encode
    monkeypatch.setattr(ImageTextToText, "_encode", lambda self, view: encoded.append(view) or encode(self, view))
    content = responses(vlm_folders("llava"), tmp_path, "out", train={"steps": 2 * EPOCH})
    trained(content)
    assert len(encoded) == 1 + 4  # the picture that a model is tried with
    monkeypatch.setattr(Image.Image, "resize", lambda *_, **__: pytest.fail("an image was prepared"))
    trained({**content, "output": str(tmp_path / "again")}, f"data.cache={tmp_path}/out/cache", "data.num_workers=1")
    assert len(encoded) == 1 + 4 + 1


def test_what_goes_to_other_devices_item_by_item_is_whole(vlm_folders: Folders) -> None:
    """As a wrapper for distribution takes an object apart; and nothing else is in memory with it."""
    family: Any = load_vision_language(str(vlm_folders("qwen3_vl")), Loading(CPU))
    (live,) = family.encode_images(
        {"wide": family.processor.preprocess_image(vlm_reference.PICTURES["wide"])}
    ).images.values()
    assert set(live.keys()) == {"pooler_output", "deepstack_features"}
    for result in (live, unpack_features(pack_features(live), CPU)):
        again = type(result)(list(result.items()))
        for actual, expected in zip(again.deepstack_features, live.deepstack_features, strict=True):
            assert all(map(torch.equal, actual, expected))


ONLINE = {"name": "bdhs", "mode": "online", "online": {"similarity": "trigrams", "tries": 1, "max_new_tokens": 2}}


@pytest.mark.slow
@pytest.mark.parametrize("tune", first_fast(["lora", "full"]))
@pytest.mark.parametrize(
    "method", [{"name": "dpo"}, {"name": "povid", "num_cached_draws": 1, "tokens": "reference"}, ONLINE]
)
def test_training_on_features_decodes_no_image(
    method: dict[str, Any], tune: str, vlm_folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for the first, by which it is known that there are some: the reference may still have to look."""
    sections: dict[str, Any] = {"method": method, "model": {"tune": tune}, "train": {"steps": EPOCH}}
    content = responses(vlm_folders("llava"), tmp_path, "out", **sections)
    cache.cache(load_recipe(content))
    decoded, decode = list[str](), response_pairs.decode
    monkeypatch.setattr(response_pairs, "decode", lambda ref: decoded.append(ref.location) or decode(ref))
    weights, _ = trained(content)
    assert len(set(decoded)) == (1 if method["name"] == "povid" else 0)
    expected, _ = trained({**content, "output": str(tmp_path / "plain")}, "data.cache='off'")
    assert_close(weights, expected)


def test_first_readable_image_decides_on_disk_space(
    vlm_folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where others come before it that cannot."""
    family: Any = load_vision_language(str(vlm_folders("llava")), Loading(CPU))
    store, images = ArrayCache.open(tmp_path / "features", {}), list[ImageRef]()
    for name, content in (("bad", b"no picture"), ("good", data_files.png(1, 16)), ("other", data_files.png(2, 16))):
        images.append(ImageRef(name, partial(str, name), partial(bytes, content)))
    monkeypatch.setattr(image_features.shutil, "disk_usage", lambda _: SimpleNamespace(free=600))
    assert not image_features.fill_features(family, images, store, Accelerator(), num_workers=0) and not len(store)
    monkeypatch.undo()
    assert image_features.fill_features(family, images, store, Accelerator(), num_workers=0) and len(store) == 2


def test_features_that_would_fill_the_disk_are_not_kept(
    vlm_folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log_lines: list[str]
) -> None:
    content = responses(vlm_folders("llava"), tmp_path, "out", train={"steps": 2})
    monkeypatch.setattr(image_features.shutil, "disk_usage", lambda _: SimpleNamespace(free=600))
    monkeypatch.setattr(cache, "move_parameters", lambda *_: pytest.fail("the tower was put away"))
    train(load_recipe(content))
    assert any(line.startswith("the images' features would take more than half of the free disk") for line in log_lines)
    assert not list((tmp_path / "out" / "cache" / "features").rglob("*.safetensors"))


def test_parts_that_learn_are_never_put_away() -> None:
    inner = torch.nn.ModuleDict({"tower": torch.nn.Linear(1, 1), "decoder": torch.nn.Linear(1, 1)})
    net = torch.nn.ModuleDict({"model": inner, "head": torch.nn.Linear(1, 1), "empty": torch.nn.Identity()})
    learning = {id(p) for part in (inner["decoder"], net["head"]) for p in part.parameters()}
    assert [name for name, _ in frozen_parts(net, learning)] == ["model.tower"]
