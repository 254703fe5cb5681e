"""Requests of a launch that a run would not fulfil are refused by name."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mmalign.config import Train
from mmalign.training.launch import SIZES, UNSUPPORTED, check_launch, connect, open_accelerator, process_lost

CONFIGS = Path(__file__).parents[2] / "configs" / "accelerate"
PLAIN, SHARDED = Train(steps=1, lr=0.1), Train(steps=1, lr=0.1, sharding="fsdp2")
CHECKPOINTED = SHARDED.model_copy(update={"gradient_checkpointing": True})
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.fixture(autouse=True)
def _no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove what a launcher of these tests may have set."""
    for name in list(os.environ):
        if name in (*SIZES, "MASTER_ADDR", "LOCAL_WORLD_SIZE") or name.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.delenv(name)


def refusal(monkeypatch: pytest.MonkeyPatch, options: Train, **environment: str) -> str:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError) as raised:
        check_launch(options)
    return str(raised.value)


@pytest.mark.parametrize("options", [PLAIN, SHARDED])
@pytest.mark.parametrize(("name", "words"), UNSUPPORTED.items())
def test_unsupported_launchers_are_refused(
    name: str, words: str, options: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = refusal(monkeypatch, options, **{name: "True"})
    assert name in message and words in message


@pytest.mark.parametrize(
    ("options", "environment", "key"),
    [
        (PLAIN, FSDP2, "train.sharding"),
        (SHARDED, {"ACCELERATE_USE_FSDP": "true"}, "FSDP version 1"),
        (SHARDED, {**FSDP2, "FSDP_OFFLOAD_PARAMS": "true"}, "FSDP_OFFLOAD_PARAMS=true"),
        (SHARDED, {**FSDP2, "FSDP_RESHARD_AFTER_FORWARD": "false"}, "FSDP_RESHARD_AFTER_FORWARD=false"),
        (SHARDED, {**FSDP2, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "train.gradient_checkpointing"),
        (SHARDED, {**FSDP2, "FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "SIZE_BASED_WRAP"),
        (PLAIN, {"ACCELERATE_MIXED_PRECISION": "bf16"}, "train.precision"),
        (PLAIN, {"ACCELERATE_MIXED_PRECISION": "fp8"}, "train.precision"),
        (PLAIN, {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "train.compile"),
        (PLAIN, {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "train.gradient_accumulation_steps"),
        (PLAIN, {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}, "started one"),
    ],
)
def test_what_a_run_would_not_do_is_refused(
    options: Train, environment: dict[str, str], key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert key in refusal(monkeypatch, options, **environment)


@pytest.mark.parametrize(
    ("options", "environment"),
    [
        (PLAIN, {}),
        (SHARDED, FSDP2),
        (CHECKPOINTED, {**FSDP2, "FSDP_ACTIVATION_CHECKPOINTING": "true"}),
        (PLAIN.model_copy(update={"precision": "bfloat16"}), {"ACCELERATE_MIXED_PRECISION": "bf16"}),
        (PLAIN, {"MASTER_ADDR": "10.0.0.1"}),
        (PLAIN, {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "10.0.0.1", "WORLD_SIZE": "2"}),
    ],
)  # fmt: skip
def test_a_launch_that_agrees_with_the_recipe_is_taken(
    options: Train, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    check_launch(options)


def test_fewer_visible_gpus_than_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    message = refusal(monkeypatch, PLAIN, WORLD_SIZE="8", LOCAL_WORLD_SIZE="4")
    assert "4 processes" in message and "2 GPUs" in message
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    check_launch(PLAIN)


@pytest.mark.parametrize("name", SIZES)
def test_processes_without_a_group_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "2")
    with pytest.raises(ValueError, match="2 processes were launched, but accelerate connects 1"):
        connect()


def test_sharding_one_process_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train\.sharding.*there is one"):
        open_accelerator(SHARDED)


@pytest.mark.slow
def test_accelerate_that_starts_one_process_of_two_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "mmalign"]
    recipe = ["train", "configs/text_to_image/sft_tiny_sd.yaml", "--set", f"output={tmp_path}/out"]
    done = subprocess.run([*command, *recipe], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode and "several processes and started one" in done.stderr
    assert not list(tmp_path.rglob("checkpoint-*"))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_its_config_and_the_launch_is_taken(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of the launched processes is the one that accelerate itself makes of the file."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    config = load_config_from_file(str(path))
    assert config.num_processes > 1 and (config.num_machines > 1) == (path.stem == "several_nodes")
    options = SHARDED if path.stem == "fsdp2" else PLAIN
    arguments = launch_command_parser().parse_args(["--config_file", str(path), "-m", "mmalign", "train"])
    environment = prepare_multi_gpu_env(_validate_launch_command(arguments)[0])
    assert (environment.get("ACCELERATE_USE_FSDP") == "true") == (path.stem == "fsdp2")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    check_launch(options)


def test_there_is_a_config_of_each_kind() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {"one_node", "several_nodes", "fsdp2"}


def test_lost_process_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gloo = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:5")
    assert process_lost(gloo, 0.5, "") is None  # one process
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0")):
        monkeypatch.setenv(name, value)
    lost = process_lost(gloo, 0.5, "the same command resumes from checkpoint-00000002")
    assert (
        lost is not None and "process 1 ended or stopped answering" in str(lost) and "checkpoint-00000002" in str(lost)
    )
    assert process_lost(RuntimeError("shapes differ"), 0.5, "") is None
