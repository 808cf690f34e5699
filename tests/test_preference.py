"""TRL's preference trainers, unmodified, on a LaVIN: the reference is the model as it was at the start."""

import math
import os
from pathlib import Path

import pytest
import torch
import training
import yaml
from conftest import fill
from datasets import Dataset, List
from datasets import Image as ImageFeature
from PIL import Image
from test_folders import run
from training import DDP, ZERO3, adapter, distance, sft
from transformers import AutoModel, AutoProcessor
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, RLOOConfig, RLOOTrainer

from lavin import MMAConfig
from lavin.recipes import cli


light = training.light
LOG2 = math.log(2)


@pytest.fixture(scope="module")
def trained(light, tmp_path_factory):
    """A light folder with an adapter, projector and modality embedding that are not as they start."""
    folder = tmp_path_factory.mktemp("trained")
    fill(AutoModel.from_pretrained(light, mma={"dropout": 0.0})).save_pretrained(folder)
    AutoProcessor.from_pretrained(light).save_pretrained(folder)
    return folder


def turn(role, text, images=()):
    return [{"role": role, "content": [*({"type": "image"} for _ in images), {"type": "text", "text": text}]}]


def table(make) -> Dataset:
    """Mixed rows; the last two, as one batch, have no image."""
    rows = []
    for i in range(8):
        images = [Image.new("RGB", (32, 32), (i * 30, 0, 0))] if i % 2 == 0 and i < 6 else []
        rows.append({"prompt": turn("user", f"What is {i}?\nResponse:", images), "images": images, **make(i)})
    return Dataset.from_list(rows).cast_column("images", List(ImageFeature()))


def better_and_worse(i):
    return {"chosen": turn("assistant", "red " * (1 + i % 3)), "rejected": turn("assistant", "blue blue")}


def good_or_bad(i):
    return {"completion": turn("assistant", "red " * (1 + i % 3)), "label": bool(i % 2)}


def train(trainer_class, config_class, model, data, folder, trainer=None, **settings):
    """Three steps; the log of each."""
    settings = {
        "use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False, "logging_steps": 1,
        "per_device_train_batch_size": 4, "learning_rate": 0.01, "max_steps": 3, "save_strategy": "no", **settings,
    }  # fmt: skip
    made = trainer_class(
        model=model,
        args=config_class(output_dir=folder, **settings),
        train_dataset=data,
        processing_class=AutoProcessor.from_pretrained(model.config._name_or_path),
        **(trainer or {}),
    )
    made.train()
    return [entry for entry in made.state.log_history if "loss" in entry]


@pytest.mark.parametrize("start", ["light", "trained"])
def test_dpo_compares_with_the_model_as_it_was(request, start, tmp_path):
    """As with the start loaded a second time as `ref_model`; a new adapter's reference is the base."""
    folder, data = request.getfixturevalue(start), table(better_and_worse)
    model = AutoModel.from_pretrained(folder, mma={})
    before = {key: value.clone() for key, value in model.state_dict().items()}
    log = train(DPOTrainer, DPOConfig, model, data, tmp_path, max_length=None)
    assert log[0]["loss"] == pytest.approx(LOG2, abs=1e-6) and log[-1]["loss"] < LOG2 - 1e-3
    for key, value in model.state_dict().items():
        first = before[key.replace(".ref.", ".mma.")]
        assert torch.equal(value, first) == (".mma." not in key), key
    assert model.active_adapters == ["mma"] and list(model.peft_config) == ["mma", "ref"]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {k for k in before if ".mma." in k}
    reference = {"ref_model": AutoModel.from_pretrained(folder)}
    policy = AutoModel.from_pretrained(folder, mma={})
    other = train(DPOTrainer, DPOConfig, policy, data, tmp_path, reference, max_length=None)
    assert [entry["loss"] for entry in other] == pytest.approx([entry["loss"] for entry in log], abs=1e-6)
    assert list(policy.peft_config) == ["mma"]


@pytest.mark.parametrize("name", ["kto", "grpo", "rloo"])
def test_other_preference_trainers(trained, tmp_path, name):
    """KTO, and GRPO and RLOO with beta: nothing lies between policy and reference at the first step."""
    model = AutoModel.from_pretrained(trained, mma={})
    if name == "kto":
        log = train(KTOTrainer, KTOConfig, model, table(good_or_bad), tmp_path, max_length=None)
        assert log[0]["loss"] == pytest.approx(0.5) and log[0]["rewards/chosen"] == 0 != log[1]["rewards/chosen"]
    else:
        trainer, config = (GRPOTrainer, GRPOConfig) if name == "grpo" else (RLOOTrainer, RLOOConfig)
        reward = {"reward_funcs": lambda completions, **kwargs: [float(len(str(c)) % 7) for c in completions]}
        settings = {"num_generations": 2, "max_completion_length": 4, "beta": 0.04}
        log = train(trainer, config, model, table(lambda i: {}), tmp_path, reward, **settings)
        assert log[0]["kl"] == pytest.approx(0, abs=1e-7) and log[1]["kl"] != 0
    model.save_pretrained(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir() if path.is_dir()) == ["mma"]


def test_only_a_copy_asked_for_as_default_is_a_reference(trained, tmp_path):
    """An adapter of one's own may be named `ref`, and is saved."""
    model = AutoModel.from_pretrained(trained, mma={})
    assert "default" not in model.peft_config and model.peft_config.get("default") is None
    with pytest.raises(KeyError):
        model.peft_config["other"]
    model.add_adapter("ref", MMAConfig())
    model.save_pretrained(tmp_path)
    assert (tmp_path / "ref" / "adapter_model.safetensors").is_file()
    model.delete_adapter("ref")
    model.add_adapter("ref", model.peft_config["default"])
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".ref." in name)
    model.set_adapter("ref")
    assert any(p.requires_grad for name, p in model.named_parameters() if ".ref." in name)


@pytest.fixture(scope="module")
def preference_rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("preference") / "train.parquet"
    table(better_and_worse).to_parquet(file)
    return file


@pytest.mark.slow
def test_trl_dpo_writes_a_lavin_folder_and_resumes(trained, preference_rows, tmp_path):
    recipe = yaml.safe_load((Path(cli.__file__).parent / "preferences" / "dpo.yaml").read_text())
    settings = {key: recipe[key] for key in recipe if key not in ("model_name_or_path", "datasets", "output_dir")}
    small = {"bf16": False, "dtype": "float32", "learning_rate": 0.01, "per_device_train_batch_size": 4}
    small |= {"gradient_accumulation_steps": 1, "logging_steps": 1, "save_total_limit": None, "warmup_steps": 0}
    settings.update(small, script="dpo")
    losses, _ = sft(trained, tmp_path / "run", preference_rows, **settings)
    assert losses[0] == pytest.approx(LOG2, abs=1e-6) and losses[2] < losses[0]
    for name in ("checkpoint-1", "checkpoint-3", "."):
        folder = tmp_path / "run" / name
        inside = {path.name for path in folder.iterdir() if path.is_dir() and "checkpoint" not in path.name}
        assert inside == {"mma"} and "config.json" in os.listdir(folder)
    assert adapter(tmp_path / "run").keys() == adapter(trained).keys()
    run(
        """
        from transformers import AutoModel, AutoProcessor
        AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
        model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
        assert model.active_adapters() == ["mma"] and list(model.peft_config) == ["mma"]
        """,
        tmp_path / "run",
    )  # fmt: skip
    first = tmp_path / "run" / "checkpoint-1"
    again, _ = sft(trained, tmp_path / "resumed", preference_rows, resume_from_checkpoint=str(first), **settings)
    assert again == losses and distance(tmp_path / "resumed", tmp_path / "run") == 0


@pytest.mark.slow
def test_trl_dpo_on_two_processes(trained, preference_rows, tmp_path):
    settings = {"script": "dpo", "model_init_kwargs": {"mma": {}}, "save_steps": 3}
    losses, _ = sft(trained, tmp_path / "one", preference_rows, **settings)
    for name, layout in {"ddp": DDP, "zero3": ZERO3}.items():
        two, _ = sft(trained, tmp_path / name, preference_rows, layout, per_device_train_batch_size=2, **settings)
        assert two == pytest.approx(losses, abs=1e-4), name
        assert distance(tmp_path / name, tmp_path / "one") < 1e-3, name
