"""What can be known to go wrong before a run is started, each with the way out."""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

from peft import PeftConfig

from lavin import LavinConfig, LavinProcessor, MMAConfig
from lavin.configuration_lavin import OWN_FIELDS
from lavin.files_lavin import ADAPTER_CONFIG, ADAPTER_NAME, BASE_WEIGHTS, find_file, read_text
from lavin.pair import tower_config
from lavin.peft_lavin import training_config as _trainable_config
from lavin.recipes.init import meta_model
from lavin.recipes.load import check_agreement
from lavin.recipes.train.base import asked_patterns, check_base_options, trained_of_base
from lavin.recipes.train.settings import Settings
from lavin.saving_lavin import check_output_folder, local_checkpoints


KEEPS_ALL = ("end", "checkpoint", "all_checkpoints")  # `hub_strategy`: after the run the whole folder is on the Hub


def check_options(settings: Settings) -> list[str]:
    """
    Checks what needs no file.

    Returns:
        `list[str]`: warnings.

    Raises:
        `ValueError`: if the run would fail, or succeed with something else than is meant.
    """
    if not settings["model_name_or_path"]:
        raise ValueError("The recipe names no model: `model_name_or_path: my-lavin` (`lavin init` makes one).")
    if not settings["trust_remote_code"]:
        raise ValueError("`trust_remote_code: true` is missing: `trl sft` loads LaVIN's code from the model's folder.")
    kwargs = settings["model_init_kwargs"] or {}
    if kwargs.get("peft") is not None:
        raise ValueError(
            "`peft` trains an adapter of PEFT's own, which `lavin train` can neither check nor resume: run `trl sft "
            "--config` on this recipe."
        )
    if kwargs.get("mma") is None and not kwargs.get("trainable"):
        raise ValueError(
            "`model_init_kwargs: {mma: {}}` is missing: without it all is frozen and nothing is trained. (In its "
            "place `{trainable: [regex, ...]}` trains parts of the base.)"
        )
    check_base_options(settings)
    if settings["use_peft"]:
        raise ValueError("`use_peft` puts LoRA on top of the adapter: remove it, and `lora_*` with it.")
    if settings["packing"] or settings["padding_free"] or settings["eval_packing"]:
        raise ValueError("LaVIN takes one row per sequence: remove `packing`, `eval_packing` and `padding_free`.")
    if (settings["load_in_4bit"] or settings["load_in_8bit"]) and find_spec("bitsandbytes") is None:
        raise ValueError('`load_in_4bit` and `load_in_8bit` need bitsandbytes: `pip install -e ".[gpu]"`.')
    if settings.deepspeed and find_spec("deepspeed") is None:
        raise ValueError('The accelerate config asks for DeepSpeed: `pip install -e ".[gpu]"`.')
    warnings = []
    if settings["logging_nan_inf_filter"] and "logging_nan_inf_filter" in settings.given:
        warnings.append("`logging_nan_inf_filter: true` shows the last finite loss in place of NaN: better false.")
    if settings.zero_stage in (1, 2) and settings["bf16"]:
        warnings.append(
            f"ZeRO-{settings.zero_stage} with `bf16: true` casts what is trained, and the saved adapter is rounded to "
            "bfloat16: add `--bf16 false`; the base stays in bfloat16 by `dtype: bfloat16`."
        )
    if settings["save_only_model"]:
        warnings.append("`save_only_model: true` leaves no optimiser in the checkpoints: they cannot be resumed from.")
    if settings["save_strategy"] == "no":
        warnings.append("`save_strategy: no` leaves no checkpoints: a run that is stopped starts from the beginning.")
    return warnings


def check_model(settings: Settings) -> tuple[LavinConfig, LavinProcessor, int]:
    """
    Reads everything of the model but its weights.

    Returns:
        `tuple`: configuration, processor, and the number of values that will be trained.

    Raises:
        `OSError`: if the folder, or a checkpoint that it names, cannot be reached.
        `ValueError`: if it is no LaVIN folder that `trl sft` can load, or has another adapter than `mma` asks for.
    """
    name, hub = settings["model_name_or_path"], hub_arguments(settings)
    make = "`lavin init --vision NAME --text NAME --output DIR` makes one."
    if not os.path.isdir(name) and (os.path.isabs(name) or name.startswith(".") or name.count("/") != 1):
        raise ValueError(f"There is no model folder {name} (paths start at {Path.cwd()}). {make}")
    try:
        found = find_file(name, "config.json", hub)
    except OSError as error:
        cause = str(error).splitlines()[0]
        raise OSError(f"{name} is neither a folder (paths start at {Path.cwd()}) nor on the Hub: {cause}") from error
    if found is None:
        raise ValueError(f"{name} has no config.json: it is no LaVIN folder. {make}")
    stored, _ = LavinConfig.get_config_dict(name, **hub)
    if stored.get("model_type") != LavinConfig.model_type:
        raise ValueError(f"{name} is a {stored.get('model_type')}, no LaVIN. {make}")
    again = "Save model and processor again with `save_pretrained`, or write a new folder with `lavin init`."
    processor = find_file(name, "processor_config.json", hub)
    if processor is None:
        raise ValueError(f"{name} has no processor (processor_config.json). {again}")
    if "auto_map" not in stored or '"auto_map"' not in read_text(processor):
        raise ValueError(f"{name} does not say where its code is (`auto_map`), and `trl sft` cannot load it. {again}")
    asked = settings["model_init_kwargs"] or {}
    config = LavinConfig.from_pretrained(name, **{key: asked[key] for key in OWN_FIELDS if key in asked}, **hub)
    if not any(find_file(name, file, hub) for file in BASE_WEIGHTS):
        sources = {"base": config.base_checkpoint}
        if config.base_checkpoint is None:
            sources = {"vision": config.vision_checkpoint, "text": config.text_checkpoint}
        for kind, source in sources.items():
            if source is None:
                raise ValueError(f"{name} has neither weights nor the name of its {kind} checkpoint. {again}")
            if kind == "base":
                LavinConfig.get_config_dict(source["name"], revision=source.get("revision") or "main")
            else:
                tower_config(source["name"], source.get("revision"), kind, {})
    processor = LavinProcessor.from_pretrained(name, **hub)
    check_agreement(config, processor, name)
    template = settings["chat_template_path"]
    if template and os.path.isfile(template):
        processor.chat_template = read_text(template)
    return config, processor, count_trained(config, settings, hub)


def count_trained(config: LavinConfig, settings: Settings, hub: dict) -> int:
    """
    The number of values in the adapter that `model_init_kwargs.mma` asks for, which must fit a stored one, or in what
    `trainable` names.
    """
    if asked_patterns(settings) is not None:
        return sum(count for _, count in trained_of_base(config, settings, hub))
    adapter = asked_adapter(settings, hub)
    if adapter is None:
        return 0
    model = meta_model(config, adapter=adapter)
    return sum(p.numel() for n, p in model.named_parameters() if f".{ADAPTER_NAME}." in n)


def asked_adapter(settings: Settings, hub: dict) -> MMAConfig | None:
    """The adapter that will be trained: that of the model's folder, or what `model_init_kwargs.mma` asks for."""
    name, mma = settings["model_name_or_path"], (settings["model_init_kwargs"] or {}).get("mma")
    if mma is None:
        return None
    has_adapter = find_file(name, f"{ADAPTER_NAME}/{ADAPTER_CONFIG}", hub) is not None
    stored = MMAConfig.from_pretrained(name, subfolder=ADAPTER_NAME, **hub) if has_adapter else None
    return _trainable_config(mma, stored, name)


def check_adapter(settings: Settings, config: LavinConfig, checkpoint: Path):
    """
    Raises:
        `ValueError`: if a checkpoint holds another adapter than the recipe's model would begin with.
    """
    asked = asked_adapter(settings, hub_arguments(settings))
    if asked is None:
        return
    meta_model(config, adapter=asked)  # fills in the target modules, as they are stored
    new, old = vars(asked), vars(MMAConfig.from_pretrained(checkpoint, subfolder=ADAPTER_NAME))
    changed = [
        f"{key}: {old[key]!r} there, {new[key]!r} in the recipe"
        for key in sorted(set(MMAConfig.__dataclass_fields__) - set(PeftConfig.__dataclass_fields__))
        if _plain(old[key]) != _plain(new[key])
    ]
    if changed:
        raise ValueError(
            f"{checkpoint} holds an adapter with other settings than `model_init_kwargs.mma` asks for "
            f"({'; '.join(changed)}). Restore the values to go on with that run, or name another `output_dir`."
        )


def _plain(value):
    return sorted(value) if isinstance(value, list | tuple | set) else value  # names have no order


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
    if (
        "trackio" in report_to
        and settings["trackio_static_space_id"] is None
        and settings["trackio_space_id"] is None
        and not settings["hub_private_repo"]
    ):
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
    installed = [name for name in ("trackio", "tensorboard", "tensorboardX") if _is_installed(name)]
    return ["trackio"] if "trackio" in installed else ["tensorboard"] if installed else []


def _is_installed(name: str) -> bool:
    spec = find_spec(name)
    return spec is not None and spec.origin is not None  # a folder of that name beside the recipe has no origin


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
    parent = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    every = settings["save_steps"] * (steps if settings["save_steps"] < 1 else 1)
    saves = {"no": 0, "epoch": settings["num_train_epochs"]}.get(settings["save_strategy"], steps / max(every, 1))
    kept = max(int(saves), 1)
    if settings["save_total_limit"]:
        kept = min(kept, settings["save_total_limit"])
    needed = size * (max(kept - held, 0) + 2)  # the oldest goes after the newest is written; and the result
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise ValueError(
            f"{parent} has {readable(free)} free, and the checkpoints to come need {readable(needed)} "
            f"({readable(size)} each, {kept} kept, one more while saving, and the result). Free some space, name "
            "another `output_dir`, or keep fewer with `save_total_limit: 2`."
        )
    return needed


def readable(count: float) -> str:
    """A number of bytes for people."""
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1024 or unit == "GB":
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1024
