"""Trained models in the forms of other programs, read by these programs and compared with the trained model."""

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import huggingface_hub
import pytest
import torch
import yaml
from diffusers import FluxPipeline, FluxTransformer2DModel
from peft import AutoPeftModel, PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

import mmalign
from mmalign import cli
from mmalign.commands._trained import TrainedModel
from mmalign.commands.load_recipe import load_recipe
from mmalign.commands.train import train
from mmalign.data.caches.fingerprint import fingerprint_weights
from mmalign.families.diffusion import export as export_module
from mmalign.families.diffusion import lora_names
from mmalign.families.diffusion.flow_matching import JOINT
from mmalign.families.diffusion.lora_files import load_lora
from mmalign.families.loading import load_family
from mmalign.families.lora import ADAPTERS, adapter_layers
from mmalign.families.types import Loading, LoraSettings
from mmalign.policy import FrozenCopy, sharding
from mmalign.training.checkpoint import Checkpoint
from mmalign.training.export import RunInfo, read_run_info
from mmalign.training.record import Record
from tests.helpers import Folders, data_files, first_fast, flow_models, recipes
from tests.helpers.commands import UNET
from tests.helpers.loading import load_diffusion, load_vlm
from tests.helpers.runs import assert_same

FLOWS = ["sd3", "flux", "flux2", "z_image", "qwen_image", "sana", *flow_models.EDITORS]
QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
VLMS = ["qwen2_5_vl", "llava", "llava_next", "qwen2_vl", "qwen3_vl", "idefics3", "paligemma", "internvl"]
# Forms that a pipeline has no reader for.
WITHOUT = {"sana": {"kohya", "comfyui"}, "flux": {"kohya"}, "flux_kontext": {"kohya"}}


@pytest.fixture
def folders(diffusion_folders: Folders, flow_folders: Folders, vlm_folders: Folders) -> Folders:
    def folder(name: str) -> Path:
        if name in ("sd15", "sdxl"):
            return diffusion_folders(name)
        return (flow_folders if name in FLOWS else vlm_folders)(name)

    return folder


def adapted(family: Any) -> Any:
    """Return the family with adapters that change its outputs, at a scale of 6."""
    family.add_lora(LoraSettings(rank=2, alpha=12.0, targets=family.default_lora_targets, seed=0))
    generator = torch.Generator().manual_seed(0)
    for layer in adapter_layers(family.network).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1, generator=generator)
    return family


@torch.no_grad()
def predicted(family: Any, net: Any) -> Tensor:
    """Return a denoiser's prediction."""
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    if family.pipeline.__class__.__name__ in ("Flux2Pipeline",):
        noise = torch.randn(1, net.config.in_channels, 4, 4, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([[16.0, 16, 0, 0, 16, 16]])
    text = flow_models.conditioning(family, ["a fox"], 16, 16)
    t = torch.tensor([500]) if family.pipeline.__class__.__name__.startswith("StableDiffusion") else torch.tensor([0.5])
    return family.predict(net, noise, t, family.condition(text, sizes))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl", "sd15", *FLOWS])
def test_adapters_of_every_form_give_the_trained_prediction(name: str, folders: Folders, tmp_path: Path) -> None:
    family = adapted(load_diffusion(folders(name)))
    wanted, plain = predicted(family, family.network), predicted(family, load_diffusion(folders(name)).network)
    assert not torch.allclose(wanted, plain, rtol=1e-2)
    for form in ("diffusers", "kohya", "comfyui", "peft", "merged"):
        folder = tmp_path / form
        folder.mkdir()
        if form in WITHOUT.get(name, set()):
            with pytest.raises(
                ValueError, match=r"neither loads its LoRA; use diffusers, peft or merged|FLUX.1 of width 3072"
            ):
                family.export(folder, family.network, form, None)
            continue
        family.export(folder, family.network, form, None)
        other: Any = load_diffusion(folder if form == "merged" else folders(name))
        if form == "peft":
            PeftModel.from_pretrained(other.network, folder)
        elif (name, form) == ("sd3", "kohya"):
            load_lora(other.pipeline, other.network, str(folder), file=None, adapter="default")
        elif form != "merged":
            (file,) = folder.glob("*.safetensors")
            other.pipeline.load_lora_weights(load_file(file))  # the weights alone, as other programs read them
        torch.testing.assert_close(predicted(other, other.network), wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def logits(model: Any, processor: Any) -> Tensor:
    image = Image.new("RGB", (32, 32), "red")
    text = processor.apply_chat_template(QUESTION) if processor.chat_template else "<image>what?"
    inputs = processor(text=[text], images=[[image]], return_tensors="pt")
    return model.eval()(**inputs).logits


@pytest.mark.slow
@pytest.mark.parametrize("name", first_fast(VLMS))
def test_vision_language_forms_give_the_trained_logits(name: str, folders: Folders, tmp_path: Path) -> None:
    family = adapted(load_vlm(folders(name)))
    wanted = logits(family.network.model, AutoProcessor.from_pretrained(folders(name)))
    for form, loader in (("peft", AutoPeftModel), ("merged", AutoModelForImageTextToText)):
        folder = tmp_path / form
        folder.mkdir()
        family.export(folder, family.network, form, None)
        model = loader.from_pretrained(folder)
        torch.testing.assert_close(logits(model, AutoProcessor.from_pretrained(folder)), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="comfyui has no vision-language models"):
        family.export(tmp_path, family.network, "comfyui", None)


def stored_in(folder: Path, target: Path, dtypes: dict[str, torch.dtype]) -> Path:
    """Copy a model, the weights of its parts, or of itself at the empty name, in these dtypes."""
    shutil.copytree(folder, target)
    for part, dtype in dtypes.items():
        for file in (target / part).glob("*.safetensors"):
            tensors = {name: x.to(dtype) if x.is_floating_point() else x for name, x in load_file(file).items()}
            save_file(tensors, file, {"format": "pt"})
    return target


def weight_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_full_model_keeps_frozen_files_and_dtypes(folders: Folders, tmp_path: Path) -> None:
    """Also where the training loads the frozen parts in another precision."""
    dtypes = {"unet": torch.float16, "vae": torch.float16, "text_encoder": torch.bfloat16}
    base = stored_in(folders("sd15"), tmp_path / "base", dtypes)
    half = Loading(torch.device("cpu"), half=torch.bfloat16, vae_dtype=torch.bfloat16)
    family: Any = load_family(str(base), half)
    family.network.conv_in.weight.data.mul_(2)
    family.save(tmp_path / "saved", family.network)
    before, after = weight_bytes(base), weight_bytes(tmp_path / "saved")
    assert [name for name in before if after[name] != before[name]] == [UNET]
    old, new = load_file(base / UNET), load_file(tmp_path / "saved" / UNET)
    assert [name for name in old if not torch.equal(old[name], new[name])] == ["conv_in.weight"]
    assert {x.dtype for x in new.values()} == {torch.float16}


def test_a_merged_model_keeps_the_dtype_of_every_weight(folders: Folders, tmp_path: Path) -> None:
    """And every file but the weights; another dtype is written into the config too."""
    base = stored_in(folders("llava"), tmp_path / "base", {"": torch.bfloat16})
    (file,) = base.glob("*.safetensors")
    tensors = load_file(file)
    norms = [name for name in tensors if "norm" in name]
    save_file({name: x.float() if name in norms else x for name, x in tensors.items()}, file, {"format": "pt"})
    family = adapted(load_vlm(base))
    for folder, dtype in (("kept", None), ("half", torch.float16)):
        (tmp_path / folder).mkdir()
        family.export(tmp_path / folder, family.network, "merged", dtype)
    kept, half = load_file(tmp_path / "kept" / file.name), load_file(tmp_path / "half" / file.name)
    assert {name: x.dtype for name, x in kept.items()} == {name: x.dtype for name, x in load_file(file).items()}
    assert all(torch.equal(x, load_file(file)[name]) for name, x in kept.items() if "vision" in name or name in norms)
    assert {x.dtype for x in half.values()} == {torch.float16}
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "float16"
    assert (tmp_path / "kept" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


def test_other_numbers_are_refused(folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that drops a layer, or a wrong number in a file."""
    family = adapted(load_diffusion(folders("sd15")))
    whole = lora_names.kohya

    def wrong(kind: str, adapters: Any, net: Any) -> dict[str, Tensor]:
        weights = whole(kind, adapters, net)
        name = next(name for name in weights if name.endswith("lora_up.weight"))
        return {**weights, name: 1.001 * weights[name]}

    monkeypatch.setitem(export_module.NAMES, "kohya", wrong)
    with pytest.raises(ValueError, match="was read back with other numbers"):
        family.export(tmp_path, family.network, "kohya", None)

    def short(kind: str, adapters: Any, net: Any) -> dict[str, Tensor]:
        return whole(kind, dict(list(adapters.items())[1:]), net)

    monkeypatch.setitem(export_module.NAMES, "kohya", short)
    with pytest.raises(ValueError, match="was read back with other numbers"):
        family.export(tmp_path, family.network, "kohya", None)


def test_flux_in_the_names_of_sd_scripts(folders: Folders) -> None:
    """Diffusers' converter, which knows FLUX.1's width of 3072 alone, gives the same changes of every layer."""
    width = 3072
    net = FluxTransformer2DModel.from_config(load_diffusion(folders("flux")).network.config)
    net.get_submodule = lambda name: SimpleNamespace(out_features=4 * width if name.endswith("mlp") else width)  # type: ignore
    generator = torch.Generator().manual_seed(0)
    names = [f"transformer_blocks.0.attn.{name}" for name in JOINT]
    names += [f"single_transformer_blocks.0.attn.{name}" for name in ("to_q", "to_v")]
    adapters = {
        name: (torch.randn(2, width, generator=generator), torch.randn(width, 2, generator=generator)) for name in names
    }
    read = FluxPipeline.lora_state_dict(lora_names.kohya("FluxPipeline", adapters, net))
    for name in names:
        a, b = (read[f"transformer.{name}.lora_{side}.weight"] for side in "AB")
        assert torch.equal(a, adapters[name][0]) and torch.equal(b, adapters[name][1])
    others = [name for name in read if name.endswith("lora_B.weight") and name.split(".lora")[0][12:] not in names]
    assert others and not any(read[name].any() for name in others)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, diffusion_folders: Folders) -> Path:
    """Train an SDXL with a validation split to its end, with checkpoints 1 and 2, and return the run's folder."""
    folder = tmp_path_factory.mktemp("run")
    base = folder / "a-model"
    shutil.copytree(diffusion_folders("sdxl"), base)
    (base / "README.md").write_text("---\nlicense: openrail++\n---\n")
    content = recipes.diffusion_in(
        base,
        folder,
        model={"tune": "lora", "lora": {"rank": 2, "alpha": 12.0}},
        data={"validation_fraction": 0.25},
        train={"steps": 2, "save_every": 1, "lr": 1e-2, "ema": 0.5},
        evaluate={"benchmark": "implicit"},
    )
    train(load_recipe(content))
    return folder / "output"


@pytest.mark.slow
def test_export_of_a_run(run: Path, tmp_path: Path) -> None:
    """ComfyUI's file of a checkpoint holds the average at that update; the end of the run is the default."""
    mmalign.evaluate(load_recipe(run))
    folder = mmalign.export(run, to="comfyui")
    assert folder == run / "export" / "comfyui"
    last, end = mmalign.export(run, to="comfyui", checkpoint=2), load_file(folder / "lora.safetensors")
    assert last.name == "comfyui-00000002"
    assert_same(load_file(last / "lora.safetensors"), end)
    first = load_file(mmalign.export(run, to="comfyui", checkpoint="1", dtype="bfloat16") / "lora.safetensors")
    assert first.keys() == end.keys() and all(name.startswith("lora_unet_") for name in end)
    assert any(x.dtype == torch.bfloat16 and not torch.equal(x.float(), end[name]) for name, x in first.items())
    best = mmalign.export(run, to="diffusers", checkpoint="best", output=tmp_path / "best")
    assert (best / ADAPTERS).is_file()
    # The card
    _, head, body = (folder / "README.md").read_text().split("---\n", 2)
    metadata = yaml.safe_load(head)
    assert metadata["license"] == "openrail++" and metadata["library_name"] == "diffusers"
    info = read_run_info(folder)
    assert info.verdict and info.verdict[1:] in body and info.identity["pairs"] in body and "| implicit" in body
    assert yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])["model"]["lora"]["alpha"] == 12.0


@pytest.mark.slow
def test_a_damaged_table_is_named(run: Path, tmp_path: Path) -> None:
    mmalign.evaluate(load_recipe(run))
    table = run / "evaluation" / "table.json"
    whole = table.read_text()
    for content in ('{"of"', "{}", '{"of": 3, "table": []}'):
        table.write_text(content)
        with pytest.raises(ValueError, match=r"table.json: is damaged .*run `mmalign evaluate` with this recipe again"):
            mmalign.export(run, to="diffusers", output=tmp_path / "exported")
    table.write_text(whole)


def test_a_run_that_was_moved_is_its_own_output(run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(run, moved, ignore=shutil.ignore_patterns("evaluation*", "export"))
    assert load_recipe(moved).output == str(moved)
    assert load_recipe(run).output == load_recipe(moved / "recipe.yaml").output == str(run)
    assert load_recipe(moved, ["output=elsewhere"]).output == "elsewhere"
    shutil.rmtree(moved / "model")
    assert load_recipe(moved).output == str(moved)
    for folder in moved.glob("checkpoint-*"):
        shutil.rmtree(folder)
    assert load_recipe(moved).output == str(run)  # a folder with a recipe, and no run


@pytest.mark.slow
def test_a_stopped_run_is_evaluated_and_shown(run: Path, tmp_path: Path) -> None:
    stopped = tmp_path / "stopped"
    shutil.copytree(run, stopped, ignore=shutil.ignore_patterns("model", "evaluation*", "export"))
    recipe = load_recipe(stopped, [f"output={stopped}"])
    with pytest.raises(ValueError, match=r"the run has not ended; --checkpoint takes best, 1, 2"):
        mmalign.evaluate(recipe)
    with pytest.raises(ValueError, match=r"has none of update 7; --checkpoint takes best, 1, 2"):
        mmalign.evaluate(recipe, checkpoint=7)
    done, end = mmalign.evaluate(recipe, checkpoint="2"), mmalign.evaluate(load_recipe(run))
    assert done.folder == stopped / "evaluation-00000002"
    assert done.result["chosen gain"] == pytest.approx(end.result["chosen gain"], rel=1e-4)  # the scale is folded
    assert end.result["chosen gain"] != mmalign.evaluate(recipe, checkpoint="1").result["chosen gain"]


def test_checkpoint_of_a_sharded_run_is_loaded_whole(
    tiny_sd15: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sharded run begins on the host, and only shards leave it."""
    moved = list[object]()
    monkeypatch.setattr(sharding, "move_to_host", lambda net, _: moved.append(net))
    recipe = load_recipe(recipes.diffusion_in(tiny_sd15, tmp_path, train={"sharding": "fsdp2", "compile": True}))
    family: Any = load_diffusion(tiny_sd15)
    identity = {"model": fingerprint_weights(family.network), "pairs": "", "pairs of a batch": "2"}
    record, weights = Record(recipe.model_dump()), {n: x + 1 for n, x in family.network.named_parameters()}
    saved = Checkpoint(weights, {}, 1, True, record, identity)
    policy = TrainedModel(tmp_path, RunInfo(1, 0.0, identity, record), saved).load(family)
    assert_same(dict(policy.unwrapped.named_parameters()), weights)
    assert isinstance(policy.reference, FrozenCopy) and not moved
    assert not any(part._compiled_call_impl for part in policy.reference.model.modules())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"to": "onnx"}, "the form 'onnx'; expected one of diffusers"),
        ({"to": "kohya", "dtype": "int4"}, "the dtype 'int4'; expected one of float32"),
        ({"to": "kohya", "push": "mine"}, "'mine' to push to; expected a name such as organisation/name"),
    ],
)
def test_wrong_arguments(run: Path, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        mmalign.export(run, **arguments)


class Hub(BaseHTTPRequestHandler):
    """Endpoints of the Hub that an upload uses; `files` has what was committed."""

    files: ClassVar[dict[str, bytes]] = {}
    created: ClassVar[dict[str, Any]] = {}

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if "Bearer" not in self.headers.get("Authorization", ""):
            return self.answer(401, {"error": "log in"})
        if self.path == "/api/repos/create":
            self.created.update(json.loads(body))
            return self.answer(200, {"url": f"http://{self.headers['Host']}/mine/aligned"})
        if self.path.endswith("/preupload/main"):
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return self.answer(200, {"files": [{**file, "shouldIgnore": False} for file in files]})
        if self.path.endswith("/commit/main"):
            for line in body.splitlines():
                if (entry := json.loads(line))["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            url = f"http://{self.headers['Host']}/mine/aligned/commit/1"
            return self.answer(200, {"commitUrl": url, "commitOid": "1", "success": True})
        return self.answer(200, {"warnings": [], "errors": []})  # the check of a model card

    def answer(self, code: int, content: object) -> None:
        text = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """Serve the Hub on this machine, for a user who is logged in."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    yield Hub
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_push(run: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = mmalign.export(run, to="comfyui", push="mine/aligned")
    assert [hub.created[key] for key in ("organization", "name", "visibility")] == ["mine", "aligned", "private"]
    assert hub.files == {name: (folder / name).read_bytes() for name in ("README.md", "lora.safetensors")}
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(ValueError, match=r"^export: mine/aligned could not be written .* log in with"):
        mmalign.export(run, to="comfyui", push="mine/aligned")


@pytest.mark.slow
def test_rows_to_a_merged_folder_on_the_command_line(vlm_folders: Folders, tmp_path: Path) -> None:
    """The merged folder of a trained Qwen2.5-VL gives transformers the numbers of base and adapter."""
    rows = data_files.response_pairs(tmp_path / "rows")
    content = recipes.vlm(vlm_folders("qwen2_5_vl"), rows, tmp_path / "output")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    for arguments in (["train", "recipe.yaml"], ["export", "output", "--to", "merged"]):
        result = CliRunner().invoke(cli.app, [arguments[0], str(tmp_path / arguments[1]), *arguments[2:]])
        assert result.exit_code == 0, result.output
    folder, adapter = tmp_path / "output" / "export" / "merged", tmp_path / "output" / "model"
    assert f'AutoModelForImageTextToText.from_pretrained("{folder}")' in result.output
    processor = AutoProcessor.from_pretrained(folder)
    merged = logits(AutoModelForImageTextToText.from_pretrained(folder), processor)
    torch.testing.assert_close(
        merged, logits(AutoPeftModel.from_pretrained(adapter), AutoProcessor.from_pretrained(adapter))
    )
    base = AutoModelForImageTextToText.from_pretrained(vlm_folders("qwen2_5_vl"))
    assert not torch.allclose(merged, logits(base, processor), rtol=1e-3)


@pytest.mark.slow
def test_a_checkpoint_has_a_gallery(tiny_sd15: Path, tmp_path: Path) -> None:
    """And the end of the run keeps its own."""
    evaluate = {"benchmark": "scenes", "prompts": 4, "sampling": {"steps": 1}}
    train_section = {"steps": 2, "save_every": 1, "lr": 1e-2}
    recipe = load_recipe(recipes.diffusion_in(tiny_sd15, tmp_path, train=train_section, evaluate=evaluate))
    train(recipe)
    page, end = mmalign.gallery(recipe, checkpoint=1), mmalign.gallery(recipe)
    assert (page.parent.name, end.parent.name) == ("gallery-00000001", "gallery")
    images = {path.name: path.read_bytes() for path in (tmp_path / "output" / "evaluation" / "after").iterdir()}
    first = {path.name: path.read_bytes() for path in (tmp_path / "output" / "evaluation-00000001" / "after").iterdir()}
    assert images.keys() == first.keys() and images != first
    assert "1 updates of" in page.read_text() and "2 updates of" in end.read_text()
