"""Runner of the command line on a recipe, and damage to its files."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from mmalign import cli

Content = dict[str, Any]
EVALUATE = {"benchmark": "scenes", "prompts": 40, "sampling": {"steps": 1}}
JUDGED = {"benchmark": "preference", "prompts": 2, "reward": {"path": "models/tiny_clip"}, "sampling": {"steps": 1}}
UNET, VAE = "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"


class Commands:
    """A runner of commands on a recipe file, with settings such as "train.lr=1"."""

    def __init__(self, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capfd = folder, capfd

    def __call__(self, command: str, content: Content, *settings: str) -> str:
        """Run a command that must succeed, and return its output."""
        code, out, err = self._run(command, content, settings)
        assert code == 0, err
        return out

    def refused(self, command: str, content: Content, *settings: str) -> str:
        """Run a command that must fail with one sentence, and return it; only progress lines may precede it."""
        code, _, err = self._run(command, content, settings)
        lines = [line for line in err.splitlines() if not line.startswith(("update ", "warning: mean |logit|"))]
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


def weights(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.safetensors"))}


def contains(sentence: str, *parts: str) -> None:
    for part in parts:
        assert part in sentence


def damage(folder: Path, file: str, *, keep: int = -1, drop: str = "", shape: str = "") -> None:
    """Cut a file after `keep` bytes, delete its tensor `drop`, or halve its tensor `shape`."""
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
