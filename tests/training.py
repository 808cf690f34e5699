"""What tests of training share: a light folder, mixed rows, `trl sft` and `lavin train` on them."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import forked
import psutil
import pytest
import yaml
from datasets import Dataset, List
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file

from lavin import LavinForConditionalGeneration, LavinProcessor
from lavin.recipes.train import checkpoints, settings


DDP = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_GPU", "num_processes": 2, "use_cpu": True}
ZERO3 = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "DEEPSPEED",
    "num_processes": 2,
    "use_cpu": True,
    "mixed_precision": "no",
    "deepspeed_config": {"zero_stage": 3, "zero3_init_flag": True, "zero3_save_16bit_model": True},
}


@pytest.fixture(scope="module")
def light(pair, tmp_path_factory):
    """A light folder, as `lavin init` writes it."""
    folder = tmp_path_factory.mktemp("light")
    vision, text = str(pair / "vision"), str(pair / "text")
    LavinForConditionalGeneration.from_vision_text_pretrained(vision, text).save_pretrained(folder, full=False)
    LavinProcessor.from_vision_text_pretrained(vision, text).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Mixed rows; the last eight, one whole batch of two processes, have no image at all."""
    draw, rows = random.Random(0), []
    for i in range(32):
        with_image = i % 2 == 0 and i < 24
        content = [{"type": "image", "text": None}] if with_image else []
        answer = " ".join(draw.choices(["red", "blue", "answer"], k=draw.randint(1, 12)))
        rows.append(
            {
                "prompt": [{"role": "user", "content": [*content, {"type": "text", "text": "What?\nResponse:"}]}],
                "completion": [{"role": "assistant", "content": [{"type": "text", "text": answer}]}],
                "images": [Image.new("RGB", (32, 32), (i * 8, 0, 0))] if with_image else [],
            }
        )
    file = tmp_path_factory.mktemp("rows") / "train.parquet"
    Dataset.from_list(rows).cast_column("images", List(ImageFeature())).to_parquet(file)
    return file


def sft(
    folder: Path, output: Path, rows: Path, accelerate: dict | Path | None = None, env: dict | None = None,
    script="sft", fresh=False, **settings,
):  # fmt: skip
    """Runs `trl sft`, or another of its scripts, from a YAML and returns its losses and its log."""
    config = {
        "model_name_or_path": str(folder),
        "trust_remote_code": True,
        "model_init_kwargs": {"mma": {"dropout": 0.0}},
        "datasets": [{"path": "parquet", "data_files": str(rows)}],
        "max_length": None,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "output_dir": str(output),
        "max_steps": 3,
        "save_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "logging_steps": 1,
        **({"shuffle_dataset": False} if script == "sft" else {}),
        "logging_nan_inf_filter": False,
        "report_to": "none",
        **settings,
    }
    output.mkdir(parents=True, exist_ok=True)
    recipe = output / f"{script}.yaml"
    recipe.write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).with_name("trl")), script, "--config", str(recipe)]
    if isinstance(accelerate, dict):
        (output / "accelerate.yaml").write_text(yaml.safe_dump(accelerate))
        accelerate = output / "accelerate.yaml"
    command += ["--accelerate_config", str(accelerate)] if accelerate else []
    done = forked.run(command, env=env, fresh=fresh)
    if done.returncode:
        raise AssertionError(done.stdout[-1500:] + done.stderr[-4000:])
    checkpoints = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    history = json.loads((checkpoints[-1] / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry], done.stdout + done.stderr


def adapter(folder: Path):
    return load_file(folder / "mma" / "adapter_model.safetensors")


def distance(a: Path, b: Path) -> float:
    a, b = adapter(a), adapter(b)
    assert a.keys() == b.keys()
    top = sum((a[key] - b[key]).norm() ** 2 for key in a)
    return float((top / sum(value.norm() ** 2 for value in b.values())) ** 0.5)


# `lavin train`

BASE = {
    "trust_remote_code": True,
    "model_init_kwargs": {"mma": {"dropout": 0.1}},
    "max_length": None,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "max_steps": 24,
    "save_steps": 2,
    "save_total_limit": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.01,
    "logging_steps": 1,
}
LAVIN = [str(Path(sys.executable).with_name("lavin")), "train"]
ENVIRONMENT = {**os.environ, **forked.ENVIRONMENT}


def recipe(folder: Path, light: Path, rows: Path, output: Path | None = None, **changes) -> list[str]:
    """Writes a recipe and returns the command that trains it."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {"datasets": [{"path": "parquet", "data_files": str(rows)}], "model_name_or_path": str(light)}
    values = {**BASE, **data, "output_dir": str(output or folder / "run"), **changes}
    values = {key: value for key, value in values.items() if value is not ...}
    (folder / "sft.yaml").write_text(yaml.safe_dump(values))
    return [*LAVIN, "--config", str(folder / "sft.yaml")]


def run(command: list[str], code: int = 0, fresh=False, cwd=None) -> str:
    """Runs a command to its end; returns what it wrote, standard output before standard error."""
    done = forked.run(command, fresh=fresh, cwd=cwd)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout + done.stderr


def losses(output: Path) -> list[float]:
    newest = checkpoints.list_checkpoints(output)[0]
    return [entry["loss"] for entry in checkpoints.read_state(newest)["log_history"] if "loss" in entry]


@pytest.fixture(scope="module")
def finished(light, rows, tmp_path_factory):
    """A run from beginning to end: its folder, its log and its command."""
    folder = tmp_path_factory.mktemp("finished")
    command = recipe(folder, light, rows)
    return folder / "run", run(command), command


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no permission to mount a small disk")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for(condition, seconds: float = 900):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.02)


# Settings. DEFAULTS are TRL's (`test_defaults_are_trls`).

DEFAULTS = {
    "model_name_or_path": None, "model_revision": "main", "trust_remote_code": False, "model_init_kwargs": None,
    "use_peft": False, "packing": False, "eval_packing": None, "padding_free": False, "load_best_model_at_end": False,
    "load_in_4bit": False, "load_in_8bit": False, "logging_nan_inf_filter": True, "save_only_model": False,
    "save_strategy": "steps", "save_steps": 500, "save_total_limit": None, "num_train_epochs": 3.0, "max_steps": -1,
    "push_to_hub": False, "hub_strategy": "every_save", "hub_private_repo": None, "dataset_name": None,
    "dataset_config": None, "dataset_train_split": "train", "dataset_test_split": "test", "dataset_streaming": False,
    "datasets": [], "streaming": False, "test_split_size": None, "eval_strategy": "no", "max_length": 1024,
    "trackio_static_space_id": None, "trackio_space_id": None, "report_to": [], "assistant_only_loss": False,
    "completion_only_loss": None, "pad_to_multiple_of": None, "chat_template_path": None, "dataset_num_proc": None,
    "resume_from_checkpoint": None, "dataloader_drop_last": False, "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 8, "hub_model_id": None, "metric_for_best_model": None,
}  # fmt: skip


def said(processes: int = 1, deepspeed: bool = False, **values) -> settings.Settings:
    return settings.Settings([], {**DEFAULTS, **values}, set(values), processes, deepspeed=deepspeed)


GOOD = {"model_name_or_path": "x", "trust_remote_code": True, "model_init_kwargs": {"mma": {}}}
