"""`load_best_model_at_end`: a run leaves its best checkpoint, whatever is trained, and goes on as before."""

import logging
import shutil

import pytest
import torch
import training
from conftest import difference, fill
from datasets import load_dataset
from safetensors.torch import load_file
from training import distance, sft
from transformers import AutoModel, AutoProcessor
from trl import SFTConfig, SFTTrainer


light, rows = training.light, training.rows
# The loss falls, so the best by this measure is the first one.
BEST_IS_FIRST = {
    "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True,
    "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1,
}  # fmt: skip


def trainer_of(folder, rows, output, model_init=None, **settings):
    settings = {
        "use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False, "max_length": None,
        "per_device_train_batch_size": 4, "learning_rate": 0.01, "max_steps": 3, **BEST_IS_FIRST, **settings,
    }  # fmt: skip
    data = load_dataset("parquet", data_files=str(rows), split="train")
    return SFTTrainer(
        AutoModel.from_pretrained(folder, **(model_init or {"mma": {"dropout": 0.0}})),
        SFTConfig(output, **settings),
        train_dataset=data,
        eval_dataset=data.select(range(4)),
        processing_class=AutoProcessor.from_pretrained(folder),
    )


def test_the_best_adapter_is_what_remains(light, rows, tmp_path, caplog):
    trainer = trainer_of(light, rows, tmp_path)
    with caplog.at_level(logging.WARNING, "transformers.trainer"):
        trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    assert "best model" not in caplog.text
    trainer.save_model(tmp_path)
    assert distance(tmp_path, tmp_path / "checkpoint-1") == 0 < distance(tmp_path, tmp_path / "checkpoint-3")
    assert not (tmp_path / "adapter_model.safetensors").exists(), "only Trainer's checkpoints need it"
    assert AutoModel.from_pretrained(tmp_path / "checkpoint-1").active_adapters() == ["mma"]


def test_a_marked_checkpoint_resumes_without_a_second_adapter(light, rows, tmp_path):
    trainer_of(light, rows, tmp_path / "run", load_best_model_at_end=False).train()
    trainer = trainer_of(light, rows, tmp_path / "again", load_best_model_at_end=False)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert list(trainer.model.peft_config) == ["mma"]
    assert distance(tmp_path / "again" / "checkpoint-3", tmp_path / "run" / "checkpoint-3") == 0
    (tmp_path / "run" / "checkpoint-1" / "adapter_model.safetensors").unlink()  # as an older LaVIN wrote it
    trainer = trainer_of(light, rows, tmp_path / "old", load_best_model_at_end=False)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    assert distance(tmp_path / "old" / "checkpoint-3", tmp_path / "run" / "checkpoint-3") == 0


@pytest.mark.parametrize("shards", [False, True])
def test_the_best_full_folder_is_what_remains(light, rows, tmp_path, shards):
    patterns = ["multi_modal_projector", "vision_tower", r"\.q_proj\."]
    trainer = trainer_of(light, rows, tmp_path, {"trainable": patterns})
    if shards:
        save = trainer.model.save_pretrained
        trainer.model.save_pretrained = lambda *args, **kwargs: save(*args, **kwargs, max_shard_size="100KB")
    trainer.train()
    trainer.model.save_pretrained = type(trainer.model).save_pretrained.__get__(trainer.model)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    trainer.model.save_pretrained(tmp_path / "last")
    found, first, last = (
        {k: v for file in sorted((tmp_path / name).glob("model*.safetensors")) for k, v in load_file(file).items()}
        for name in ("last", "checkpoint-1", "checkpoint-3")
    )
    assert found.keys() == first.keys() and all(torch.equal(found[key], first[key]) for key in first)
    assert any(not torch.equal(last[key], first[key]) for key in first)


@pytest.mark.slow
def test_trl_sft_takes_the_best(light, rows, tmp_path):
    for split in ("train", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        shutil.copy(rows, tmp_path / "data" / f"{split}.parquet")
    run = tmp_path / "run"
    sft(light, run, rows, datasets=[], dataset_name=str(tmp_path / "data"), **BEST_IS_FIRST)
    assert distance(run, run / "checkpoint-1") == 0 < distance(run, run / "checkpoint-3")


def test_a_full_checkpoint_is_no_place_to_go_on_from(light, tmp_path):
    """Trainer would load none of its weights, with a line in the log."""
    model = AutoModel.from_pretrained(light, mma={})
    model.save_pretrained(tmp_path / "checkpoint-1", full=True)
    with pytest.raises(ValueError, match="from_pretrained"):
        model.load_state_dict(load_file(tmp_path / "checkpoint-1" / "model.safetensors"), False)
    assert model.load_state_dict(model.state_dict()).missing_keys == []


def test_load_adapter_of_a_model_in_training(light, tmp_path):
    """A LaVIN folder's `mma/`, into an adapter that is there or a new one; what does not fit changes nothing."""
    fill(AutoModel.from_pretrained(light, mma={"dropout": 0.0})).save_pretrained(tmp_path / "a")
    fill(AutoModel.from_pretrained(light, mma={"scale": 2.0})).save_pretrained(tmp_path / "scaled")
    fill(AutoModel.from_pretrained(light, mma={"r": 4})).save_pretrained(tmp_path / "narrow")
    model = AutoModel.from_pretrained(light, mma={"dropout": 0.0})
    start = {key: value.clone() for key, value in model.state_dict().items()}
    for name, said in (("scaled", "`scale` 2.0, and 'mma' has 1.0"), ("narrow", "other settings")):
        with pytest.raises(ValueError, match=said):
            model.load_adapter(tmp_path / name, "mma")
    with pytest.raises(ValueError, match="neither mma/adapter_config.json"):
        model.load_adapter(light, "other")
    for key, value in model.state_dict().items():
        assert torch.equal(value, start[key]), key
    model.load_adapter(tmp_path / "a", "mma", is_trainable=True)
    other = AutoModel.from_pretrained(tmp_path / "a", mma={})
    ids = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        expected = other.eval()(ids).logits
        assert difference(model.eval()(ids).logits, expected) == 0
        model.load_adapter(tmp_path / "scaled" / "mma", "beside")
        assert model.active_adapters == ["mma"] and difference(model(ids).logits, expected) == 0
        model.set_adapter("beside")
        scaled = AutoModel.from_pretrained(tmp_path / "scaled")
        assert difference(model(ids).logits, scaled(ids).logits) == 0
    shutil.rmtree(tmp_path / "a" / "mma")
    with pytest.raises(ValueError, match="No adapter"):
        model.load_adapter(tmp_path / "a", "mma")
