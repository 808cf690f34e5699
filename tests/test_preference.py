"""TRL's preference trainers, unmodified, on a LaVIN: the reference is the model as it was at the start."""

import math
import os

import pytest
import test_trl
import torch
from conftest import fill
from datasets import Dataset, List
from datasets import Image as ImageFeature
from PIL import Image
from transformers import AutoModel, AutoProcessor
from trl import DPOConfig, DPOTrainer


light = test_trl.light
LOG2 = math.log(2)


@pytest.fixture(scope="module")
def trained(light, tmp_path_factory):
    """A light folder with an adapter, projector and modality embedding that are not as they start."""
    folder = tmp_path_factory.mktemp("trained")
    model = fill(AutoModel.from_pretrained(light, mma={"dropout": 0.1}))
    model.save_pretrained(folder)
    AutoProcessor.from_pretrained(light).save_pretrained(folder)
    return folder


def turn(role, text, images=()):
    return [{"role": role, "content": [*({"type": "image"} for _ in images), {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def pairs():
    rows = []
    for i in range(8):
        images = [Image.new("RGB", (32, 32), (i * 30, 0, 0))] if i % 2 == 0 and i < 6 else []
        rows.append(
            {
                "prompt": turn("user", f"What is {i}?\nResponse:", images),
                "chosen": turn("assistant", "red " * (1 + i % 3)),
                "rejected": turn("assistant", "blue blue"),
                "images": images,
            }
        )
    return Dataset.from_list(rows).cast_column("images", List(ImageFeature()))


def settings(**values):
    return {
        "use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False, "max_length": None,
        "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 0.01, "max_steps": 3, "save_steps": 1,
        "lr_scheduler_type": "constant", **values,
    }  # fmt: skip


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("start", ["fresh", "trained"])
def test_dpo_starts_at_its_reference(light, trained, pairs, tmp_path, start):
    folder = light if start == "fresh" else trained
    model = AutoModel.from_pretrained(folder, mma={})
    first = {key: value.clone() for key, value in model.state_dict().items() if ".mma." in key}
    trainer = DPOTrainer(
        model,
        args=DPOConfig(tmp_path, **settings()),
        train_dataset=pairs,
        processing_class=AutoProcessor.from_pretrained(light),
    )
    trainer.train()
    print(losses(trainer))
    assert losses(trainer)[0] == pytest.approx(LOG2, abs=1e-6)
    assert losses(trainer)[-1] < LOG2 - 1e-3
    state = model.state_dict()
    for key, value in first.items():
        assert torch.equal(state[key.replace(".mma.", ".ref.")], value), key
        assert not torch.equal(state[key], value), key
    for name in ("checkpoint-1", "checkpoint-3", "."):
        print(sorted(os.listdir(tmp_path / name)))
