"""Runs that are exported: their folders, checkpoints, cards and uploads."""

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest
import torch
import yaml
from peft import AutoPeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

import mmalign
from mmalign import cli
from mmalign.commands._trained import TrainedModel
from mmalign.commands.load_recipe import load_recipe
from mmalign.commands.train import train
from mmalign.data.caches.fingerprint import fingerprint_weights
from mmalign.families.lora import ADAPTERS
from mmalign.policy import FrozenCopy, sharding
from mmalign.training.checkpoint import Checkpoint
from mmalign.training.export import RunInfo, read_run_info
from mmalign.training.record import Record
from tests.helpers import Folders, data_files, recipes
from tests.helpers.loading import load_diffusion, logits
from tests.helpers.runs import assert_same


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
