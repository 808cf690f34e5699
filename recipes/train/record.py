"""What a run was started with, kept beside its checkpoints: an edited recipe must not go on from them unnoticed."""

import hashlib
import json
import os
from pathlib import Path

from datasets import Dataset
from peft import PeftConfig

from lavin import MMAConfig
from lavin.files_lavin import ADAPTER_CONFIG, ADAPTER_NAME

from .base import asked_patterns
from .checkpoints import read_state, step_of
from .checks import asked_adapter
from .settings import Settings


RECORD = "lavin_train.json"
# What shapes the result. Neither layout (processes, ZeRO, rows per process) nor precision, logs or paths are among it.
SHAPING = (
    "learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio optim optim_args weight_decay "
    "adam_beta1 adam_beta2 adam_epsilon max_grad_norm label_smoothing_factor neftune_noise_alpha loss_type "
    "completion_only_loss seed data_seed train_sampling_strategy shuffle_dataset dataloader_drop_last load_in_4bit "
    "load_in_8bit"
).split()
ADAPTER = sorted(set(MMAConfig.__dataclass_fields__) - set(PeftConfig.__dataclass_fields__))
SAMPLED = 64  # rows whose text is compared; of all others the lengths are


def describe(settings: Settings, model, rows, columns: list[str], measured: dict, steps: int) -> dict:
    """
    Args:
        settings ([`Settings`]): Those of the run.
        model ([`LavinConfig`]): Configuration of the model.
        rows (`Dataset` or `IterableDataset`): What is trained on; `columns` are those with messages.
        measured (`dict`): What [`measure`](rows.py) gave for them.
        steps (`int`): Optimiser steps of the run.

    Returns:
        `dict`: what shapes the training, in JSON's types and without any path, so that files may be moved.
    """
    batch = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    towers = []
    for config, checkpoint in zip(
        (model.vision_config, model.text_config), (model.vision_checkpoint, model.text_checkpoint), strict=True
    ):
        name = (checkpoint or {}).get("name") or ""
        on_hub = name.count("/") == 1 and not os.path.isabs(name) and not os.path.isdir(name)
        towers.append([config.model_type, getattr(config, "hidden_size", None), *([name] if on_hub else [])])
    digest = hashlib.sha256()
    for key in ("images", "prompt", "completion"):
        digest.update(measured[key].astype("int64").tobytes())
    count = len(measured["prompt"])
    if isinstance(rows, Dataset):
        chosen = range(0, count, max(count // SAMPLED, 1))
        texts = rows.select([*chosen, count - 1]).select_columns(columns).to_list()
        digest.update(json.dumps(texts, sort_keys=True).encode())
    adapter = asked_adapter(settings)
    found = {
        **{name: settings[name] for name in SHAPING},
        "trainable": asked_patterns(settings),
        **(_settings_of(adapter) if adapter else {}),
        "rows per step (processes x per_device_train_batch_size x gradient_accumulation_steps)": settings.processes
        * batch,
        "model": towers,
        "rows (number, hash of texts and lengths)": [count, digest.hexdigest()[:12]],
        "steps": steps,
    }
    return json.loads(json.dumps(found, default=str))


def _settings_of(adapter: MMAConfig) -> dict:
    return {f"adapter's {key}": _plain(getattr(adapter, key)) for key in ADAPTER}


def _plain(value):
    return sorted(value) if isinstance(value, list | tuple | set) else value  # names have no order


def write_record(output: Path, record: dict):
    """Writes `lavin_train.json`, whole or not at all."""
    draft = output / f".{RECORD}"
    draft.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    draft.replace(output / RECORD)


def compare_record(checkpoint: Path, new: dict) -> str | None:
    """
    Compares a recipe with what a checkpoint was trained with: its record, and where that says nothing of the adapter
    (as after plain `trl sft`), the checkpoint's own. Where nothing is known, nothing is said.

    Returns:
        `str` or `None`: a warning, if the run is to be longer than it was.

    Raises:
        `ValueError`: if something that shapes the training is another.
    """
    old, own = {}, checkpoint / ADAPTER_NAME
    if (own / ADAPTER_CONFIG).is_file():
        old = _settings_of(MMAConfig.from_pretrained(own))
        if new.get("adapter's target_modules") is None:  # the default, of which a checkpoint holds what it became
            del old["adapter's target_modules"]
    try:
        old |= json.loads((checkpoint.parent / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        pass
    changed = {key: (old[key], value) for key, value in new.items() if key in old and old[key] != value}
    longer = None
    if changed.pop("steps", None):
        planned = read_state(checkpoint).get("max_steps") or old["steps"]  # the record may be of a later try
        if new["steps"] < planned and not changed:
            changed["steps (max_steps, num_train_epochs)"] = planned, new["steps"]
        elif new["steps"] > planned:
            longer = (
                f"the run is now {new['steps']:,} steps long instead of {planned:,}, and its learning-rate schedule "
                f"is computed anew: unless that is constant, the rate jumps up again at step {step_of(checkpoint):,}."
            )
    if not changed:
        return longer
    listed = "\n".join(f"  {key}: {json.dumps(a)} before, {json.dumps(b)} now" for key, (a, b) in changed.items())
    raise ValueError(
        f"{checkpoint} was trained with other settings than these:\n{listed}\n"
        "To go on with that run, restore the values. To start anew, name another `output_dir`. To continue its "
        f"adapter with new settings, do that and set `model_name_or_path: {checkpoint.parent}` (the finished run) or "
        f"`{checkpoint}`. (To end a run sooner, stop it: each checkpoint is a complete folder.)"
    )
