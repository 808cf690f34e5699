"""Unmodified `trl sft` on a LaVIN folder: adapter-only checkpoints, resume, distributed runs, 4-bit, pushing."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset, List
from datasets import Image as ImageFeature
from PIL import Image
from safetensors.torch import load_file
from test_folders import PUSH, run
from transformers import AutoModel, AutoProcessor

from lavin import LavinForConditionalGeneration, LavinProcessor


pytestmark = pytest.mark.slow
IDS = torch.tensor([[1, 5, 6, 7]])


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
    folder: Path, output: Path, rows: Path, accelerate: dict | None = None, env: dict | None = None, script="sft",
    **settings,
):  # fmt: skip
    """Runs the real `trl sft`, or another of its scripts, from a YAML and returns its log history."""
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
    if accelerate is not None:
        (output / "accelerate.yaml").write_text(yaml.safe_dump(accelerate))
        command += ["--accelerate_config", str(output / "accelerate.yaml")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **(env or {})}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
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


@pytest.mark.main_path
def test_three_steps_from_yaml_then_resume_and_continue(light, rows, tmp_path):
    losses, _ = sft(light, tmp_path / "run", rows)
    assert len(losses) == 3
    for name in ("checkpoint-1", "checkpoint-2", "checkpoint-3", "."):
        folder = tmp_path / "run" / name
        assert not list(folder.glob("model*.safetensors")) and not (folder / "adapter_config.json").exists()
        assert {"config.json", "modeling_lavin.py", "processor_config.json", "README.md"} <= set(os.listdir(folder))
    first, last = adapter(tmp_path / "run" / "checkpoint-1"), adapter(tmp_path / "run" / "checkpoint-3")
    assert first.keys() == last.keys() and all(not torch.equal(first[key], last[key]) for key in first)
    run("""
        from transformers import AutoModel, AutoProcessor
        AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
        model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
        assert model.active_adapters() == ["mma"]
        """, tmp_path / "run" / "checkpoint-3")  # fmt: skip
    # Killed after step 1 and resumed: the same run.
    resumed = tmp_path / "resumed"
    sft(light, resumed, rows, max_steps=3, resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert distance(resumed, tmp_path / "run") == 0
    # A new run from the result continues with its adapter.
    again, _ = sft(tmp_path / "run", tmp_path / "again", rows, model_init_kwargs={"mma": {}})
    assert again[0] < losses[0]
    assert AutoModel.from_pretrained(tmp_path / "again").config.text_checkpoint is not None


def test_training_without_mma_raises_and_names_it(light, rows, tmp_path):
    with pytest.raises(AssertionError, match=r"model_init_kwargs: \{mma: \{\}\}"):
        sft(light, tmp_path, rows, model_init_kwargs={})


def test_full_folder_trains_to_a_light_repo_that_names_it(light, rows, tmp_path):
    AutoModel.from_pretrained(light).save_pretrained(tmp_path / "full", full=True)
    AutoProcessor.from_pretrained(light).save_pretrained(tmp_path / "full")
    sft(tmp_path / "full", tmp_path / "run", rows, max_steps=1)
    assert not list((tmp_path / "run").glob("model*.safetensors"))
    model = AutoModel.from_pretrained(tmp_path / "run")
    assert model.config.base_checkpoint["name"] == str(tmp_path / "full")
    assert model.active_adapters() == ["mma"]


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
def one_process(light, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "run"
    losses, _ = sft(light, folder, rows, max_steps=4, save_steps=4, per_device_train_batch_size=8)
    return folder, losses


@pytest.mark.parametrize("layout", ["ddp", "zero3-checkpointing"])
def test_two_processes_train_like_one(light, rows, one_process, tmp_path, layout):
    """The last step has no image on any rank, the others on both or one; ranks must run the same modules."""
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    settings = reentrant if layout.startswith("zero3") else {}
    losses, log = sft(
        light, tmp_path / "two", rows, DDP if layout == "ddp" else ZERO3, max_steps=4, save_steps=4, **settings
    )
    folder, expected = one_process
    assert losses == pytest.approx(expected, abs=1e-4)
    assert distance(tmp_path / "two", folder) < 1e-3
    router = [key for key in adapter(folder) if "router" in key or "modality" in key]
    assert router
    if layout.startswith("zero3"):
        assert "use_reentrant=False" in log


def test_four_bit_base_trains_on_cpu(light, rows, tmp_path):
    pytest.importorskip("bitsandbytes")
    losses, _ = sft(
        light, tmp_path / "run", rows, load_in_4bit=True, use_bnb_nested_quant=True, bnb_4bit_quant_type="nf4",
        gradient_checkpointing=True,
    )  # fmt: skip
    assert len(losses) == 3
    first, last = adapter(tmp_path / "run" / "checkpoint-1"), adapter(tmp_path / "run" / "checkpoint-3")
    assert all(not torch.equal(first[key], last[key]) for key in first)
    assert {value.dtype for value in last.values()} == {torch.float32}, "cast by TRL"
    AutoModel.from_pretrained(tmp_path / "run")


def test_push_to_hub_of_trl_leaves_a_repo_that_loads(hub, pair, rows, tmp_path):
    run(PUSH, {"org/vision": str(pair / "vision"), "org/text": str(pair / "text")}, **hub)
    run(
        """
        del sys.modules["lavin"]
        from lavin import LavinForConditionalGeneration, LavinProcessor
        names = "org/vision", "org/text"
        LavinForConditionalGeneration.from_vision_text_pretrained(*names).save_pretrained(sys.argv[1], full=False)
        LavinProcessor.from_vision_text_pretrained(*names).save_pretrained(sys.argv[1])
        """,
        tmp_path / "light", HF_HOME=str(tmp_path / "cache0"), **hub,
    )  # fmt: skip
    env = {"HF_HOME": str(tmp_path / "cache1"), **hub}
    sft(
        tmp_path / "light", tmp_path / "run", rows, env=env,
        push_to_hub=True, hub_model_id="org/tuned", hub_strategy="end", trackio_static_space_id=False,
    )  # fmt: skip
    run(
        """
        from transformers import AutoModel, AutoProcessor
        from huggingface_hub import HfApi
        model = AutoModel.from_pretrained("org/tuned", trust_remote_code=True)
        AutoProcessor.from_pretrained("org/tuned", trust_remote_code=True)
        assert model.active_adapters() == ["mma"]
        files = HfApi().list_repo_files("org/tuned")
        assert "model.safetensors" not in files and "mma/adapter_model.safetensors" in files, files
        """,
        HF_HOME=str(tmp_path / "cache2"), **hub,
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "lavin.recipes.cli", "card", str(tmp_path / "run"), "--push", "org/tuned"],
        capture_output=True, text=True, env={**os.environ, **env},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run(
        """
        from huggingface_hub import hf_hub_download
        card = open(hf_hub_download("org/tuned", "README.md")).read()
        assert "Trainable parameters" in card and "- org/text" in card
        """,
        HF_HOME=str(tmp_path / "cache3"), **hub,
    )  # fmt: skip
