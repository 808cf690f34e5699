"""What would go wrong without a word, or after hours, each with the way out. What TRL says at once, TRL says."""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

from lavin import LavinConfig, LavinProcessor, MMAConfig
from lavin.configuration_lavin import OWN_FIELDS
from lavin.files_lavin import ADAPTER_CONFIG, ADAPTER_NAME, BASE_WEIGHTS, find_file, read_json, read_text
from lavin.peft_lavin import training_config
from lavin.saving_lavin import check_output_folder, local_checkpoints

from ..init import meta_model
from ..load import check_agreement, load_processor
from ..report import readable
from .base import asked_patterns, check_base_options, trained_of_base
from .settings import Settings


KEEPS_ALL = ("end", "checkpoint", "all_checkpoints")  # `hub_strategy`: after the run the whole folder is on the Hub


def check_options(settings: Settings) -> list[str]:
    """
    Checks what needs no file.

    Returns:
        `list[str]`: warnings.

    Raises:
        `ValueError`: if the run would succeed with something else than is meant.
    """
    if not settings["model_name_or_path"]:
        raise ValueError("The recipe names no model: `model_name_or_path: my-lavin` (`lavin init` makes one).")
    if (settings["model_init_kwargs"] or {}).get("peft") is not None:
        raise ValueError(
            "`peft` trains an adapter of PEFT's own, which `lavin train` can neither check nor resume: run `trl sft "
            "--config` on this recipe."
        )
    check_base_options(settings)
    if settings["use_peft"]:
        raise ValueError("`use_peft` puts LoRA on top of the adapter: remove it, and `lora_*` with it.")
    doubts = [
        (
            settings["logging_nan_inf_filter"] and "logging_nan_inf_filter" in settings.given,
            "`logging_nan_inf_filter: true` shows the last finite loss in place of NaN: better false.",
        ),
        (
            settings.zero_stage in (1, 2) and settings["bf16"],
            f"ZeRO-{settings.zero_stage} with `bf16: true` casts what is trained, and the saved adapter is rounded to "
            "bfloat16: add `--bf16 false`; the base stays in bfloat16 by `dtype: bfloat16`.",
        ),
        (
            settings["save_only_model"],
            "`save_only_model: true` leaves no optimiser in the checkpoints: they cannot be resumed from.",
        ),
        (
            settings["save_strategy"] == "no",
            "`save_strategy: no` leaves no checkpoints: a run that is stopped starts from the beginning.",
        ),
    ]
    return [words for doubtful, words in doubts if doubtful]


def check_model(settings: Settings) -> tuple[LavinConfig, LavinProcessor, int]:
    """
    Reads everything of the model but its weights.

    Returns:
        `tuple`: configuration, processor, and the number of values that will be trained.

    Raises:
        `OSError`: if the folder cannot be reached.
        `ValueError`: if it is no LaVIN folder, model and processor do not agree, or it has another adapter than `mma`
            asks for.
    """
    name, hub = settings["model_name_or_path"], hub_arguments(settings)
    stored = os.path.join(name, "config.json")
    if os.path.isfile(stored) and (kind := read_json(stored).get("model_type")) != LavinConfig.model_type:
        raise ValueError(f"{name} is a {kind}, no LaVIN. `lavin init` makes one of it and a vision tower.")
    processor = load_processor(name, hub.get("revision"))
    asked = settings["model_init_kwargs"] or {}
    config = LavinConfig.from_pretrained(name, **{key: asked[key] for key in OWN_FIELDS if key in asked}, **hub)
    check_agreement(config, processor, name)
    template = settings["chat_template_path"]
    if template and os.path.isfile(template):
        processor.chat_template = read_text(template)
    if asked_patterns(settings) is not None:
        return config, processor, sum(count for _, count in trained_of_base(config, settings, hub))
    adapter = asked_adapter(settings)
    if adapter is None:  # the model's own message says so as soon as it trains
        return config, processor, 0
    named = meta_model(config, adapter=adapter).named_parameters()
    return config, processor, sum(p.numel() for n, p in named if f".{ADAPTER_NAME}." in n)


def asked_adapter(settings: Settings) -> MMAConfig | None:
    """The adapter that will be trained: that of the model's folder, or what `model_init_kwargs.mma` asks for."""
    name, mma = settings["model_name_or_path"], (settings["model_init_kwargs"] or {}).get("mma")
    if mma is None:
        return None
    hub = hub_arguments(settings)
    has_adapter = find_file(name, f"{ADAPTER_NAME}/{ADAPTER_CONFIG}", hub) is not None
    stored = MMAConfig.from_pretrained(name, subfolder=ADAPTER_NAME, **hub) if has_adapter else None
    return training_config(mma, stored, name)


def hub_arguments(settings: Settings) -> dict:
    """The revision of the model, where the recipe names one."""
    return {} if settings["model_revision"] in (None, "main") else {"revision": settings["model_revision"]}


def check_push(settings: Settings, config: LavinConfig, report_to: list[str]):
    """
    Raises:
        `ValueError`: if what `push_to_hub` leaves on the Hub could not be loaded by others, would not be complete, or
        would show more than is meant.
    """
    if not settings["push_to_hub"]:
        return
    name = settings["model_name_or_path"]
    full = os.path.isdir(name) and any(os.path.isfile(os.path.join(name, file)) for file in BASE_WEIGHTS)
    local = [name] if full else local_checkpoints(config)
    if local and asked_patterns(settings) is None:
        raise ValueError(
            f"`push_to_hub` would upload an adapter whose base is on this machine ({', '.join(local)}): nobody else "
            "could load it. Start from checkpoints on the Hub (`lavin init --vision NAME --text NAME`)."
        )
    if settings["hub_strategy"] not in KEEPS_ALL:
        raise ValueError(
            f"`hub_strategy: {settings['hub_strategy']}` uploads without the code and the adapter (`mma/`) while the "
            "run goes on: set `hub_strategy: end`, or `checkpoint` to have the last one on the Hub as well."
        )
    if settings["dataset_name"] and os.path.exists(settings["dataset_name"]):
        raise ValueError(
            f"TRL would write the path {settings['dataset_name']} into the card, which the Hub refuses after the run. "
            "Name the files with `datasets: [{path: parquet, data_files: ...}]` instead."
        )
    unnamed = settings["trackio_static_space_id"] is None and settings["trackio_space_id"] is None
    if "trackio" in report_to and unnamed and not settings["hub_private_repo"]:
        raise ValueError(
            "With `push_to_hub`, trackio would put this run's logs into a public Space. Keep them here with "
            "`trackio_static_space_id: false` in the YAML; or name a Space there, or set `hub_private_repo: true`."
        )


def choose_report_to(settings: Settings) -> list[str]:
    """
    Where the curves go: what the recipe says, else trackio (on this machine: it has a Space only if
    `trackio_space_id` names one), else tensorboard, by what is installed.
    """
    if "report_to" in settings.given:
        return list(settings["report_to"] or [])
    specs = {name: find_spec(name) for name in ("trackio", "tensorboard", "tensorboardX")}
    installed = [name for name, spec in specs.items() if spec and spec.origin]  # a folder of that name has none
    return ["trackio"] if "trackio" in installed else ["tensorboard"] if installed else []


def checkpoint_bytes(
    trained: int, deepspeed: bool, processor_folder: str | os.PathLike | None = None, base: int = 0
) -> int:
    """
    About how large a checkpoint is: the adapter and AdamW's two moments in float32 (under ZeRO the master weights and
    a copy of the adapter too), code and processor. Where the base is trained, its `base` bytes in the adapter's place.
    """
    files = Path(processor_folder).glob("*") if processor_folder and os.path.isdir(processor_folder) else []
    small = sum(f.stat().st_size for f in files if f.is_file() and f.suffix not in (".safetensors", ".bin", ".pt"))
    return trained * 4 * (5 if deepspeed else 3) + small + 2**18 + max(base - trained * 4, 0)


def check_output(settings: Settings, size: int, steps: int, held: int = 0) -> int:
    """
    Args:
        size (`int`): Bytes of one checkpoint.
        steps (`int`): Optimiser steps of the run.
        held (`int`, *optional*, defaults to 0): Checkpoints that are there already.

    Returns:
        `int`: bytes that are still to be written and kept.

    Raises:
        `ValueError`: if `output_dir` cannot be written, or there is no room for the checkpoints to come.
    """
    folder = Path(settings["output_dir"])
    check_output_folder(folder)
    every = settings["save_steps"] * (steps if settings["save_steps"] < 1 else 1)
    saves = {"no": 0, "epoch": settings["num_train_epochs"]}.get(settings["save_strategy"], steps / max(every, 1))
    kept = min(max(int(saves), 1), settings["save_total_limit"] or int(saves) + 1)
    needed = size * (max(kept - held, 0) + 2)  # the oldest goes after the newest is written; and the result
    check_room(folder, needed, f"the checkpoints to come need {readable(needed)} ({readable(size)} each, {kept} kept)")
    return needed


def check_room(folder: Path, needed: int, words: str):
    """
    Raises:
        `ValueError`: if the disk of a folder, which need not be there yet, has less free.
    """
    parent = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    if (free := shutil.disk_usage(parent).free) < needed:
        raise ValueError(
            f"{parent} has {readable(free)} free, and {words}. Free some space, name another `output_dir`, or keep "
            "fewer checkpoints with `save_total_limit: 1`."
        )
