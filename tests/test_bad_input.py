"""Every mistake a person can make ends in one sentence and exit code 1, before it costs anything, and loses nothing."""

import contextlib
import io
import json
import os
import resource
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
import yaml
from diffusers import DiffusionPipeline, ModelMixin
from PIL import Image, ImageFile
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from typer.testing import CliRunner

from mmalign import checkpoint, cli

Content = dict[str, Any]
EVALUATE = {"benchmark": "scenes", "prompts": 40, "drawing": {"steps": 1}}
JUDGED = {"benchmark": "preference", "prompts": 2, "judge": {"path": "models/tiny_clip"}, "drawing": {"steps": 1}}


@pytest.fixture(autouse=True)
def _no_bars() -> None:
    """What the command line sets by the environment, too late where a test has imported the library already."""
    datasets.disable_progress_bars()


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return tiny.pick_a_pic(tmp_path / "pairs.parquet")


class Commands:
    """Runs commands on a recipe file, with settings such as "train.lr=1"."""

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capfd = folder, capfd

    def __call__(self, command: str, content: Content, *settings: str) -> str:
        """What a command that succeeds prints."""
        code, out, _ = self._run(command, content, settings)
        assert code == 0
        return out

    def refused(self, command: str, content: Content, *settings: str) -> str:
        """The one sentence of a command that fails: no traceback, nothing else but the progress until then."""
        code, _, err = self._run(command, content, settings)
        lines = [line for line in err.splitlines() if not line.startswith(("update ", "warning: gradient factor"))]
        assert code == 1 and len(lines) == 1 and lines[0].startswith("error: "), err
        return lines[0].removeprefix("error: ")

    def _run(self, command: str, content: Content, settings: tuple[str, ...]) -> tuple[int, str, str]:
        recipe = self.folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(content))
        arguments = [command, str(recipe), *(word for s in settings for word in ("--set", s))]
        self.capfd.readouterr()
        result = CliRunner().invoke(cli.app, arguments)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        noise = self.capfd.readouterr()
        assert noise.out == noise.err == "", "a library wrote past the command line"
        return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def mmalign(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Commands:
    return Commands(tmp_path, capfd)


@pytest.fixture
def content(tiny_sd15: Path, pairs: Path, tmp_path: Path) -> Content:
    return tiny.recipe(tiny_sd15, pairs, tmp_path / "out", train={"steps": 2}, evaluate=EVALUATE)


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weights may be read."""
    for cls in (DiffusionPipeline, ModelMixin, PreTrainedModel):
        monkeypatch.setattr(cls, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setattr("open_clip.create_model_from_pretrained", lambda *_, **__: pytest.fail("a judge was loaded"))


def weights(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.safetensors"))}


def contains(sentence: str, *parts: str) -> None:
    for part in parts:
        assert part in sentence


# ------------------------------------------------------------------------------------------- before any model is loaded


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_sd15: Path) -> Path:
    """A folder of broken things."""
    here = tmp_path_factory.mktemp("world")
    table = pq.read_table(tiny.pick_a_pic(here / "good.parquet"))
    pq.write_table(table.slice(0, 0), here / "empty.parquet")
    pq.write_table(table.drop_columns(["jpg_1"]), here / "lacking.parquet")
    ties = [{**row, "label_0": 0.5, "label_1": 0.5} for row in table.to_pylist()]
    pq.write_table(pa.Table.from_pylist(ties), here / "ties.parquet")
    (here / "cut.parquet").write_bytes((here / "good.parquet").read_bytes()[:3000])
    (here / "zero.parquet").touch()
    (here / "lines.jsonl").write_text('{"prompt": "a fox", "chosen": "a.png"}\n')
    (here / "comments.txt").write_text("# no prompt\n\n")
    (here / "latin.txt").write_bytes("ein Fuchs mit Hüten".encode("latin-1"))
    for name in ("no_index", "bad_index", "list_index", "flux", "no_tokenizer", "no_unet"):
        shutil.copytree(tiny_sd15, here / name)
    (here / "no_index" / "model_index.json").unlink()
    (here / "bad_index" / "model_index.json").write_text("{")
    (here / "list_index" / "model_index.json").write_text("[]")
    (here / "flux" / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    shutil.rmtree(here / "no_unet" / "unet")
    for path in (here / "no_tokenizer" / "tokenizer").iterdir():
        path.unlink()
    return here


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        # Keys and values.
        ("train.lrr=1e-5", "train has no 'lrr'; did you mean 'lr'?"),
        ("trian={steps: 3}", "a recipe has no 'trian'; did you mean 'train'?"),
        ("train.lr=fast", "train.lr: expected a number, got the text 'fast'"),
        ("train.steps=2.5", "train.steps: "),
        ("train.steps=many", "train.steps: expected a whole number, got the text 'many'"),
        ("data.path=3", "data.path: expected text, got 3; write it in quotes"),
        ("method.name=difusion_dpo", "there is no method 'difusion_dpo'; did you mean 'diffusion_dpo'?"),
        ("method.betta=3", "method has no 'betta'; did you mean 'beta'?"),
        ("train.lr", "--set 'train.lr': expected section.key=value, such as train.lr=1e-5"),
        ("=1", "--set '=1': expected section.key=value"),
        ("train.lr.x=1", "--set train.lr.x: train.lr is no section"),
        ("train.betas=[0.9, 0.99", "--set train.betas: is not a recipe in YAML"),
        # Pairs.
        ("data.path=W/pair.parquet", "data.path: W/pair.parquet does not exist; expected *.parquet"),
        ("data.path=someone/pairs", "data.path: someone/pairs is no file here and could not be loaded from the Hub"),
        ("data.path=W/cut.parquet", "data.path: W/cut.parquet is no readable parquet file"),
        ("data.path=W/zero.parquet", "data.path: W/zero.parquet is no readable parquet file"),
        ("data.path=W/lacking.parquet", "W/lacking.parquet has no 'jpg_1' (found caption, jpg_0,"),
        ("data.columns={jpg_0: picture}", "has no 'picture' (found caption, jpg_0,"),
        ("data={format: folder, path: W}", "lines.jsonl: line 1 has no 'rejected' (found prompt, chosen)"),
        ("data.path=W/empty.parquet", "data.path: W/empty.parquet has no rows; expected one a pair"),
        ("data.path=W/ties.parquet", "data.path: W/ties.parquet has no pair to learn from (8 ties, 0 rows dropped)"),
        ("data.hold_out=0.0001", "data.hold_out: 0.0001 of 8 groups in "),
        ("data.hold_out=0.9999", "leaves none for training; use another share"),
        ("data.cache=W/good.parquet", "data.cache: W/good.parquet is a file; expected a folder"),
        ("data={crop: random, cache: W, path: W/good.parquet}", "data.cache: W cannot be used with data.crop: random"),
        # Models.
        ("model.path=W/sd15", "model.path: there is no file or folder 'W/sd15'"),
        ("model.path=models/tiny_sdd", "did you mean 'models/tiny_sd'"),
        (
            "model.path=W/good.parquet",
            "model.path: W/good.parquet is a file; expected the folder of a diffusers pipeline",
        ),
        ("model.path=W/no_index", "model.path: W/no_index has no model_index.json; expected the folder of"),
        ("model.path=W/bad_index", "model.path: W/bad_index/model_index.json cannot be read as the index"),
        ("model.path=W/list_index", "model.path: W/list_index/model_index.json cannot be read as the index"),
        ("model.path=W/flux", "model.path: W/flux is a FluxPipeline; supported are StableDiffusionPipeline, "),
        ("model.path=W/no_unet", "model.path: W/no_unet has no unet; copy it anew"),
        ("model.path=W/no_tokenizer", "model.path: W/no_tokenizer has no tokenizer; copy it anew"),
        (
            "model.path=someone/sd15",
            "model.path: someone/sd15 is no folder here, and its model_index.json did not come ",
        ),
        ("model.vae=W/vae", "model.vae: there is no file or folder 'W/vae'"),
        # Everything else.
        ("train.trackers=[tensorbord]", "train.trackers: tensorbord is unknown; correct it, or leave it out"),
        ("evaluate.prompts=0", "evaluate.prompts: expected at least 1, or a file with one prompt a line, got 0"),
        ("evaluate.drawing.resolution=20", "evaluate.drawing.resolution: expected a multiple of 8 pixels, got 20"),
        ("output=W/good.parquet", "output: W/good.parquet is a file; expected a folder"),
        (
            "output=W/good.parquet/run",
            "output: W/good.parquet/run cannot be written to (Not a directory); name a folder",
        ),
    ],
)
def test_a_mistake_is_told_before_any_model_is_loaded(
    setting: str, sentence: str, mmalign: Commands, content: Content, world: Path
) -> None:
    told = mmalign.refused("train", content, setting.replace("W", str(world)))
    contains(told, sentence.replace("W", str(world)))


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("tracker", ["wandb", "aim", "mlflow"])
def test_a_tracker_that_is_not_installed_is_not_left_out_in_silence(
    tracker: str, mmalign: Commands, content: Content
) -> None:
    from accelerate.tracking import get_available_trackers

    if tracker in [str(t) for t in get_available_trackers()]:
        pytest.skip(f"{tracker} is installed")
    contains(mmalign.refused("train", content, f"train.trackers=[{tracker}]"), f"train.trackers: {tracker} is not inst")


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("quickstrat", "did you mean 'configs/text_to_image/quickstart.yaml'"),
        ("configs/text_to_image/quickstrat.yaml", "did you mean 'configs/text_to_image/quickstart.yaml'"),
        ("/nowhere/recipe.yaml", "there is no file or folder '/nowhere/recipe.yaml'"),
        ("configs", "cannot be read (Is a directory); expected a recipe, a file in YAML"),
    ],
)
def test_a_recipe_that_is_not_there(name: str, sentence: str) -> None:
    result = CliRunner().invoke(cli.app, ["train", name])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    contains(result.stderr, "error: ", sentence)


@pytest.mark.usefixtures("no_model")
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_output(mmalign: Commands, content: Content, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    told = mmalign.refused("train", content, f"output={tmp_path / 'locked' / 'out'}")
    contains(told, "output: ", "cannot be written to (Permission denied); name a folder")


def test_numbers_in_every_spelling(mmalign: Commands, content: Content, tmp_path: Path) -> None:
    """In YAML 1.1 `1e-8` is a text."""
    text = yaml.safe_dump(content).replace("lr: 0.001", "lr: 1e-8")
    assert "lr: 1e-8" in text
    (tmp_path / "written.yaml").write_text(text)
    result = CliRunner().invoke(cli.app, ["train", str(tmp_path / "written.yaml"), "--set", "train.weight_decay=1e-3"])
    assert result.exit_code == 0, result.output
    saved = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["train"]
    assert float(saved["lr"]) == 1e-8 and saved["weight_decay"] == 1e-3


# ---------------------------------------------------------------------------------------------------------- model files


def damage(folder: Path, file: str, *, keep: int = -1, drop: str = "", shape: str = "") -> None:
    """Cut a file after `keep` bytes, or take a tensor out of it or half of one."""
    path = folder / file
    if keep >= 0:
        path.write_bytes(path.read_bytes()[:keep])
        return
    tensors = load_file(path)
    if drop:
        del tensors[drop]
    if shape:
        tensors[shape] = tensors[shape][: len(tensors[shape]) // 2].clone()
    save_file(tensors, path, {"format": "pt"})


UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    "how",
    [
        {"file": UNET, "keep": 0},
        {"file": UNET, "keep": 5000},
        {"file": UNET, "drop": "conv_in.weight"},
        {"file": UNET, "shape": "conv_in.weight"},
        {"file": VAE, "keep": 5000},
        {"file": VAE, "drop": "encoder.conv_in.weight"},
        {"file": "text_encoder/model.safetensors", "keep": 5000},
        {"file": "unet/config.json", "keep": 10},
    ],
    ids=lambda how: "-".join(map(str, how.values())),
)
def test_damaged_weights(how: dict[str, Any], mmalign: Commands, content: Content, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(content["model"]["path"], model)
    damage(model, **how)
    told = mmalign.refused("train", content, f"model.path={model}")
    contains(told, f"model.path: {model} could not be loaded as a StableDiffusionPipeline (", "copy it anew")


def test_weights_that_are_gone(mmalign: Commands, content: Content, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(content["model"]["path"], model)
    (model / UNET).unlink()
    contains(mmalign.refused("train", content, f"model.path={model}"), f"model.path: {model} could not be", "no file")


def test_another_autoencoder_that_is_none(mmalign: Commands, content: Content) -> None:
    whole = content["model"]["path"]
    told = mmalign.refused("train", content, f"model.vae={whole}")
    contains(told, f"model.vae: {whole} could not be loaded as an AutoencoderKL")
    told = mmalign.refused("train", content, "model.vae=someone/vae")
    contains(told, "model.vae: someone/vae could not", "see to the name and the network")


def test_adapters_for_layers_that_are_not_there(mmalign: Commands, content: Content) -> None:
    told = mmalign.refused("train", content, "model.tune=lora", "model.lora.targets=[to_x]")
    contains(told, "model.lora.targets: no layer of UNet2DConditionModel ends in to_x")


# --------------------------------------------------------------------------------------------------------------- images


def solid(width: int, height: int) -> bytes:
    """A black PNG of one bit a pixel, made without its pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, row = zlib.compressobj(), b"\0" * (1 + (width + 7) // 8)
    packed = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


BAD = {0: tiny.picture(0)[:300], 1: b"", 2: solid(1, 1), 3: solid(20_000, 20_000)}


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_a_bad_image_drops_its_pair_counted_and_named(
    cache: str, mmalign: Commands, content: Content, pairs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut short, of zero bytes, of one pixel, of 400 million; no memory is taken for the last."""
    decoded: list[int] = []
    load = ImageFile.ImageFile.load

    def recorded(image: ImageFile.ImageFile) -> Any:
        decoded.append(image.size[0] * image.size[1])
        return load(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", recorded)
    tiny.pick_a_pic(pairs, bad=BAD)
    assert len(BAD[3]) < 100_000
    with pytest.raises(Image.DecompressionBombError, match="400000000 pixels"):
        Image.open(io.BytesIO(BAD[3]))
    printed = mmalign("train", content, f"data.cache='{cache}'", "data.max_bad=4", "train.steps=4")
    contains(printed, "4 images could not be read; their pairs were left out: pairs.parquet: row ", "and 1 more")
    assert decoded and max(decoded) <= 400
    shutil.rmtree(content["output"])
    for row, reason in enumerate(
        ["is not a readable image", "has zero bytes", "is 1x1; expected", "is larger than 80,000,000 pixels"]
    ):
        alone = tiny.pick_a_pic(pairs.with_name(f"{row}.parquet"), bad={row: BAD[row]})
        data = f"data={{path: {alone}, cache: '{cache}', max_bad: 0}}"
        told = mmalign.refused("train", content, data, "train.batch_size=8")
        contains(told, f"more than data.max_bad = 0 images are bad ({row}.parquet: row {row}, jpg_0: ", reason)


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_the_run_ends_if_too_many_images_are_bad_or_no_pair_is_left(
    cache: str, mmalign: Commands, content: Content, pairs: Path, tmp_path: Path
) -> None:
    tiny.pick_a_pic(pairs, bad=BAD)
    told = mmalign.refused("train", content, f"data.cache='{cache}'", "data.max_bad=3", "train.steps=4")
    contains(told, "more than data.max_bad = 3 images are bad (", "and 1 more", "raise data.max_bad")
    tiny.pick_a_pic(pairs, bad=dict.fromkeys(range(8), b"<html>not found</html>"))
    told = mmalign.refused("train", content, f"data.cache='{cache}'", f"output={tmp_path / 'none'}")
    contains(told, "none of 8 pairs has two readable images (pairs.parquet: row ", "and 5 more); repair the images")
    assert "0x" not in told  # no object's address
    assert not list((tmp_path / "none").glob("checkpoint-*")) and not (tmp_path / "none" / "model").exists()


def test_held_out_pairs_are_looked_at_before_training_too(mmalign: Commands, content: Content, pairs: Path) -> None:
    """Else the first checkpoint would find out, and its updates be lost."""
    from mmalign.data.pairs import hold_out
    from mmalign.data.sources import open_pairs

    tiny.pick_a_pic(pairs, number=12)
    _, held = hold_out(open_pairs("pick_a_pic", str(pairs)), 0.4, 0)
    tiny.pick_a_pic(pairs, number=12, bad={int(pair.where.split("row ")[1]): b"" for pair in held})
    told = mmalign.refused("train", content, "data.hold_out=0.4", "data.cache='off'")
    contains(told, f"none of {len(held)} pairs has two readable images")


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_a_caption_of_10_000_characters_is_cut_and_that_is_said(
    cache: str, mmalign: Commands, content: Content, pairs: Path
) -> None:
    rows = pq.read_table(pairs).to_pylist()
    rows[0]["caption"], rows[1]["caption"] = "x" * 10_000, "word " * 2000
    pq.write_table(pa.Table.from_pylist(rows), pairs)
    contains(
        mmalign("train", content, f"data.cache='{cache}'"), "2 of 8 prompts are longer than the text encoder reads"
    )


def test_fewer_pairs_than_one_batch_are_enough(mmalign: Commands, content: Content) -> None:
    assert "8 pairs" in mmalign("train", content, "train.batch_size=32")


@pytest.mark.parametrize("content_of", ["model", "resolution"])
def test_a_cache_of_another_model_or_resolution_is_refused(
    content_of: str, mmalign: Commands, content: Content, tiny_sd2: Path, tmp_path: Path
) -> None:
    cache = f"data.cache={tmp_path / 'cache'}"
    mmalign("train", content, cache)
    before = weights(tmp_path / "cache")
    tiny.stable_diffusion(tmp_path / "other", seed=1)
    mmalign.capfd.readouterr()
    setting = {"model": f"model.path={tmp_path / 'other'}", "resolution": "data.resolution=32"}[content_of]
    told = mmalign.refused("train", content, cache, setting, f"output={tmp_path / 'second'}")
    contains(told, f"data.cache: {tmp_path / 'cache' / 'latents'} was made otherwise: ", "use another data.cache")
    assert weights(tmp_path / "cache") == before and before


# ----------------------------------------------------------------------------------------------------- another's folder


@pytest.mark.parametrize(
    ("settings", "differs"),
    [
        (["model.path=OTHER"], "model "),
        (["method={name: sft}"], "method diffusion_dpo; this one has method sft"),
        (["model.tune=lora"], "tune full; this one has tune lora of rank 16"),
        (["train.optimizer=adafactor"], "optimizer adamw; this one has optimizer adafactor"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_left_alone(
    settings: list[str], differs: str, mmalign: Commands, content: Content, tmp_path: Path
) -> None:
    mmalign("train", content)
    out, other = tmp_path / "out", tiny.stable_diffusion(tmp_path / "other", seed=1)
    recipe, before = (out / "recipe.yaml").read_text(), weights(out)
    mmalign.capfd.readouterr()
    told = mmalign.refused("train", content, "train.steps=4", *(s.replace("OTHER", str(other)) for s in settings))
    contains(told, f"{out / 'checkpoint-00000002'}: belongs to another run ({differs}", "use another output folder")
    assert (out / "recipe.yaml").read_text() == recipe and weights(out) == before


def test_adapters_of_another_rank_are_refused(mmalign: Commands, content: Content) -> None:
    mmalign("train", content, "model.tune=lora")
    told = mmalign.refused("train", content, "model.tune=lora", "model.lora.rank=4", "train.steps=4")
    contains(told, "belongs to another run (tune lora of rank 16", "this one has tune lora of rank 4")


def test_a_checkpoint_that_goes_further_or_has_no_average(mmalign: Commands, content: Content) -> None:
    mmalign("train", content)
    told = mmalign.refused("train", content, "train.steps=1")
    contains(told, "train.steps: ", "has done 2 updates already, more than the 1 asked for; raise train.steps")
    told = mmalign.refused("train", content, "train.steps=4", "train.ema=0.9")
    contains(told, "train.ema: ", "has no average of the weights")


def test_a_trained_model_is_not_compared_with_another_base(mmalign: Commands, content: Content, tmp_path: Path) -> None:
    mmalign("train", content)
    other = tiny.stable_diffusion(tmp_path / "other", seed=1)
    mmalign.capfd.readouterr()
    told = mmalign.refused("evaluate", content, f"model.path={other}")
    contains(told, f"{tmp_path / 'out' / 'model'}: was trained from another model than {other} (fingerprint ")
    assert not (tmp_path / "out" / "evaluation").exists()


# ------------------------------------------------------------------------------------------- evaluate, gallery, prepare


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("command", "evaluate", "sentence"),
    [
        ("evaluate", EVALUATE, "there is no trained model; run `mmalign train` with this recipe first"),
        ("gallery", EVALUATE, "there is no trained model; run `mmalign train` with this recipe first"),
        ("evaluate", None, "evaluate: the recipe has no such section; add one, for example"),
        ("gallery", None, "evaluate: the recipe has no such section"),
        ("gallery", {"benchmark": "implicit"}, "evaluate: benchmark implicit draws no pictures"),
        ("evaluate", {"benchmark": "implicit"}, "evaluate: implicit needs pairs kept from training; set data.hold_out"),
        ("evaluate", {"benchmark": "preference"}, "benchmark preference needs a judge; add evaluate.judge.path"),
        ("evaluate", {**JUDGED, "prompts": "W/none.txt"}, "evaluate.prompts: there is no file or folder 'W/none.txt'"),
        (
            "evaluate",
            {**JUDGED, "prompts": "W/comments.txt"},
            "evaluate.prompts: W/comments.txt has none; expected one",
        ),
        ("evaluate", {**JUDGED, "prompts": "W/latin.txt"}, "evaluate.prompts: W/latin.txt cannot be read"),
        ("evaluate", {**JUDGED, "prompts": "W"}, "evaluate.prompts: W cannot be read ("),
        ("evaluate", {**JUDGED, "judge": {"path": "models/tiny_klip"}}, "evaluate.judge.path: there is no file"),
        ("evaluate", {**JUDGED, "judge": {"path": "W/x", "name": "open_klip"}}, "there is no 'open_klip'; there are"),
        ("prepare", EVALUATE, "prepare: the recipe has no such section; add one with a judge"),
    ],
)
def test_what_evaluation_needs_is_told_before_any_model_is_loaded(
    command: str, evaluate: Content | None, sentence: str, mmalign: Commands, content: Content, world: Path
) -> None:
    filled = json.loads(json.dumps(evaluate).replace("W", str(world)))
    told = mmalign.refused(command, {**content, "evaluate": filled})
    contains(told, sentence.replace("W", str(world)))
    assert not Path(content["output"]).exists()


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("prepare.judge.path=models/tiny_klip", "prepare.judge.path: there is no file or folder 'models/tiny_klip'"),
        ("prepare.prompts=W/comments.txt", "prepare.prompts: W/comments.txt has none"),
        ("data.path=W", "data.path: W is a folder; expected the name of the parquet file that prepare writes"),
        ("data.path=W/good.parquet/x.parquet", "data.path: W/good.parquet cannot be written to (File exists)"),
    ],
)
def test_what_prepare_needs_is_told_before_any_model_is_loaded(
    setting: str, sentence: str, mmalign: Commands, content: Content, world: Path
) -> None:
    section = {"judge": {"path": "models/tiny_clip"}, "prompts": 2}
    told = mmalign.refused("prepare", {**content, "prepare": section}, setting.replace("W", str(world)))
    contains(told, sentence.replace("W", str(world)))


def test_a_judge_that_cannot_be_loaded_is_told_before_anything_is_drawn(
    mmalign: Commands, content: Content, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mmalign("train", content)
    monkeypatch.setattr("mmalign.run.draw", lambda *_: pytest.fail("pictures were drawn"))
    judge = tmp_path / "judge"
    from mmalign.share import resolve

    shutil.copytree(resolve("models/tiny_clip"), judge)
    damage(judge, "open_clip_model.safetensors", keep=1000)
    told = mmalign.refused("evaluate", {**content, "evaluate": {**JUDGED, "judge": {"path": str(judge)}}})
    contains(told, "judge", str(judge))
    options = {"path": "models/tiny_clip", "options": {"batchsize": 2}}
    told = mmalign.refused("evaluate", {**content, "evaluate": {**JUDGED, "judge": options}})
    contains(told, "judge open_clip: batchsize: ", "options: pretrained, batch_size")


def test_a_damaged_trained_model(mmalign: Commands, content: Content, tmp_path: Path) -> None:
    mmalign("train", content)
    damage(tmp_path / "out" / "model", UNET, keep=1000)
    told = mmalign.refused("evaluate", content)
    contains(told, f"{tmp_path / 'out' / 'model'} could not be loaded", "`mmalign train` writes it anew")
    mmalign("train", content)
    assert "prompts fulfilled" in mmalign("evaluate", content)


# ---------------------------------------------------------------------------------------------------------- a full disk


@contextlib.contextmanager
def full_disk(largest: int) -> Iterator[None]:
    """No file can grow beyond `largest` bytes: every library meets a real failure to write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_at_a_checkpoint_keeps_the_one_before(mmalign: Commands, content: Content, tmp_path: Path) -> None:
    mmalign("train", content, f"output={tmp_path / 'whole'}", "train.steps=4")
    out = tmp_path / "out"
    mmalign("train", content)
    before = weights(out)
    with full_disk(100_000):
        told = mmalign.refused("train", content, "train.steps=4")
    contains(told, f"{out / 'checkpoint-00000004'}: could not be written (", "checkpoint-00000002 is intact: make room")
    assert weights(out) == before and not list(out.glob("*.part"))
    assert "going on from checkpoint-00000002" in mmalign("train", content, "train.steps=4")
    assert weights(out / "model") == weights(tmp_path / "whole" / "model")


def test_a_full_disk_at_the_export_keeps_the_model_before(mmalign: Commands, content: Content, tmp_path: Path) -> None:
    mmalign("train", content)
    model = tmp_path / "out" / "model"
    before = weights(model)
    with full_disk(100_000):  # all updates are done: what fails is the export
        told = mmalign.refused("train", content)
    contains(
        told, f"{model}: could not be written (", "what was there before is kept: make room and run the same command"
    )
    assert weights(model) == before and not list(model.parent.glob(".model.*"))


def test_a_full_disk_at_the_cache_keeps_what_was_encoded(mmalign: Commands, content: Content, tmp_path: Path) -> None:
    mmalign("train", content, "data.limit=2", "data.cache='off'", f"output={tmp_path / 'first'}")  # maps the table
    with full_disk(10_000):
        told = mmalign.refused("train", content)
    contains(told, f"data.cache: {tmp_path / 'out' / 'cache' / 'latents'}: could not write", "make room and run again")
    assert not list((tmp_path / "out" / "cache").rglob("*.part"))
    mmalign("train", content)


def test_a_full_disk_where_tables_are_mapped(mmalign: Commands, content: Content, pairs: Path) -> None:
    tiny.pick_a_pic(pairs, number=11)  # a table that no test has mapped
    with full_disk(5_000):
        told = mmalign.refused("train", content, f"data.path={pairs}")
    contains(told, f"data.path: {pairs} could not be copied to ", "set HF_DATASETS_CACHE to another folder")


def test_a_full_disk_at_evaluation_and_gallery_keeps_those_before(
    mmalign: Commands, content: Content, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    mmalign("train", content)
    mmalign("evaluate", content)
    page = Path(mmalign("gallery", content).removeprefix("gallery: ").strip())
    samples, shown = (out / "evaluation" / "samples.json").read_bytes(), page.read_bytes()
    with full_disk(4_000):
        told = mmalign.refused("evaluate", content)
        contains(told, f"{out / 'evaluation'}: could not be written (", "what was there before is kept: make room")
        told = mmalign.refused("gallery", content, "gallery.title=Another")
        contains(told, f"{out / 'gallery'}: could not be written (", "make room")
    assert (out / "evaluation" / "samples.json").read_bytes() == samples and page.read_bytes() == shown
    assert not [p for p in out.rglob("*") if p.name.endswith(".part")]


# ---------------------------------------------------------------------------------------------------- losses that break


def finite(folder: Path) -> bool:
    return all(x.isfinite().all() for x in load_file(folder / "model.safetensors").values())


def test_a_loss_that_is_not_finite_names_its_batch_and_keeps_the_last_good_checkpoint(
    mmalign: Commands, content: Content, tmp_path: Path
) -> None:
    """The same command with a lower learning rate goes on."""
    mmalign("train", content, "train.save_every=1")
    told = mmalign.refused("train", content, "train.steps=6", "train.save_every=100", "train.lr=1e30")
    contains(
        told, "train: the loss is not finite after update 3, in batch 4 of epoch 0 (pairs.parquet: row ", ", pairs"
    )
    contains(told, "the same command goes on from checkpoint-00000002: lower train.lr")
    last = checkpoint.latest(tmp_path / "out")
    assert last is not None and last.name == "checkpoint-00000002" and finite(last)
    assert "going on from checkpoint-00000002" in mmalign("train", content, "train.steps=6", "train.lr=1e-4")


@pytest.mark.parametrize("lr", ["1e30", "1e38"])
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_what_nobody_could_go_on_from_is_not_saved(
    lr: str, tune: str, mmalign: Commands, content: Content, tmp_path: Path
) -> None:
    """An update can break a model whose last loss was finite: its weights (at 1e38) or its next loss (at 1e30)."""
    out = tmp_path / "out"
    mmalign("train", content, f"model.tune={tune}")
    before = weights(out)
    told = mmalign.refused("train", content, f"model.tune={tune}", "train.steps=3", f"train.lr={lr}")
    contains(told, "train: after update 3 the ", "not finite, so that update was not saved", "lower train.lr")
    assert weights(out) == before
    assert "going on from checkpoint-00000002" in mmalign("train", content, f"model.tune={tune}", "train.steps=3")
    assert all(finite(path) for path in out.glob("checkpoint-*"))


def test_a_poisoned_model(mmalign: Commands, content: Content, tmp_path: Path) -> None:
    model = tmp_path / "poisoned"
    shutil.copytree(content["model"]["path"], model)
    tensors = load_file(model / UNET)
    tensors["conv_in.weight"] = torch.full_like(tensors["conv_in.weight"], float("nan"))
    save_file(tensors, model / UNET, {"format": "pt"})
    told = mmalign.refused("train", content, f"model.path={model}")
    contains(told, "the loss is not finite after update 0, in batch 1 of epoch 0 (pairs.parquet: row ")
    contains(told, "nothing has been saved yet")
    assert not list((tmp_path / "out").glob("checkpoint-*")) and not (tmp_path / "out" / "model").exists()
