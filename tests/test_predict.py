"""`Trainer.predict` and `evaluate` on batches with and without images, with their options, and TRL's `evaluate`."""

import numpy as np
import pytest
import torch
import training
from conftest import VOCAB, pad, pixels, row, tiny_lavin, tiny_peft
from datasets import load_dataset
from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer


light, rows = training.light, training.rows
IMAGES = (1, 0, 0, 0, 2, 1, 1)  # in batches of two: one image, none, three, one


def collate(examples):
    inputs = pad([example["ids"] for example in examples], "right")
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    if images := [example["pixel_values"] for example in examples if example["pixel_values"] is not None]:
        inputs["pixel_values"] = torch.cat(images)
    return inputs


@pytest.fixture(scope="module")
def examples():
    config = tiny_lavin(adapter=False).config
    return [
        {"ids": row(config, n, 6 + i, i), "pixel_values": pixels(n, i) if n else None} for i, n in enumerate(IMAGES)
    ]


def trainer_of(model, examples, folder, metrics=None, **settings):
    settings = {"remove_unused_columns": False, "use_cpu": True, "report_to": "none", **settings}
    arguments = TrainingArguments(folder, per_device_eval_batch_size=2, **settings)
    return Trainer(model, arguments, collate, eval_dataset=examples, compute_metrics=metrics)


def assert_logits(model, examples, logits):
    """Row by row those of each example alone."""
    for i, example in enumerate(examples):
        with torch.no_grad():
            expected = model(**collate([example])).logits[0].numpy()
        assert np.abs(logits[i][: len(expected)] - expected).max() < 1e-4


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"eval_accumulation_steps": 1},
        {"include_for_metrics": ["inputs", "loss"]},
        {"label_names": ["labels"], "prediction_loss_only": False},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
@pytest.mark.parametrize("adapter", ["none", "inside", "peft"])
def test_predict_and_evaluate_on_mixed_batches(examples, tmp_path, adapter, settings):
    model = tiny_peft() if adapter == "peft" else tiny_lavin(adapter=adapter == "inside")
    trainer = trainer_of(model, examples, tmp_path, lambda found: {"width": found.predictions.shape[-1]}, **settings)
    logits, labels, metrics = trainer.predict(examples)
    assert logits.shape == (*labels.shape, VOCAB) and metrics["test_width"] == VOCAB
    assert_logits(model, examples, logits)
    found = trainer.evaluate()
    assert found["eval_loss"] == pytest.approx(metrics["test_loss"]) and found["eval_width"] == VOCAB


def test_predict_where_more_than_the_logits_is_returned(examples, tmp_path):
    """Hidden states and attentions of two batches never have one shape."""
    model = tiny_lavin()
    model.set_attn_implementation("eager")
    model.config.text_config.output_hidden_states = model.config.text_config.output_attentions = True
    outputs = model(**collate(examples[:2]))
    assert outputs.hidden_states and outputs.attentions and outputs.image_hidden_states is not None
    logits = trainer_of(model, examples, tmp_path).predict(examples).predictions
    assert_logits(model, examples, logits)
    parts = trainer_of(model, examples, tmp_path, eval_do_concat_batches=False).predict(examples).predictions
    assert_logits(model, examples, [one for part in parts for one in part])
    loss_only = trainer_of(model, examples, tmp_path, prediction_loss_only=True).predict(examples)
    assert loss_only.predictions is None and loss_only.metrics["test_loss"] > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.return_outputs=True.:FutureWarning")  # until TRL 2 it is the way to have metrics
def test_sft_trainer_evaluates_mixed_batches(light, rows, tmp_path):
    """With metrics of one's own, whose logits TRL makes beside its loss."""
    shapes = []
    trainer = SFTTrainer(
        AutoModel.from_pretrained(light, mma={}),
        SFTConfig(tmp_path, max_length=None, use_cpu=True, bf16=False, report_to="none", per_device_eval_batch_size=3),
        train_dataset=(data := load_dataset("parquet", data_files=str(rows), split="train")),
        eval_dataset=data,
        processing_class=AutoProcessor.from_pretrained(light),
        compute_metrics=lambda found: shapes.append(found.predictions.shape) or {"rows": len(found.predictions)},
    )
    metrics = trainer.evaluate()
    assert metrics["eval_rows"] == len(data) and metrics["eval_loss"] > 0 and len(shapes[0]) == 3
