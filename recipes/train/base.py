"""Runs that train weights of the base (`model_init_kwargs: {trainable: [...]}`): what they ask for, what they cost."""

import torch

from lavin import LavinConfig
from lavin.files_lavin import ADAPTER_CONFIG, ADAPTER_NAME, find_file
from lavin.trainable_lavin import BOTH, EXISTING_ADAPTER, QUANTISED, check_patterns, trained_names

from ..init import meta_model
from .settings import Settings


LOW = ("bfloat16", "float16")


def asked_patterns(settings: Settings) -> list[str] | None:
    """`model_init_kwargs.trainable`, `None` where the recipe has none."""
    return (settings["model_init_kwargs"] or {}).get("trainable")


def check_base_options(settings: Settings):
    """
    Raises:
        `ValueError`: if a run with `trainable` would fail, or train something else than is meant.
    """
    patterns = asked_patterns(settings)
    if patterns is None:
        return
    check_patterns(patterns)
    if settings["model_init_kwargs"].get("mma") is not None:
        raise ValueError(BOTH)
    if settings["load_in_4bit"] or settings["load_in_8bit"]:
        raise ValueError(QUANTISED)
    if settings["dtype"] in LOW and not (settings["bf16"] or settings["fp16"] or settings.deepspeed):
        raise ValueError(
            f"With `dtype: {settings['dtype']}` what is not trained is in {settings['dtype']}, and what is trained in "
            "float32: the two can be multiplied under autocast only. Add `bf16: true`, or set `dtype: float32`."
        )


def trained_of_base(config: LavinConfig, settings: Settings, hub: dict) -> list[tuple[str, int]]:
    """
    The parameters of the base that a run will train, each with its number of values; tied ones once.

    Raises:
        `ValueError`: if a pattern matches nothing, or the model's folder holds an adapter or quantised weights.
    """
    name = settings["model_name_or_path"]
    if find_file(name, f"{ADAPTER_NAME}/{ADAPTER_CONFIG}", hub) is not None:
        raise ValueError(EXISTING_ADAPTER.format(name=name, adapter=ADAPTER_NAME))
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(QUANTISED)
    model = meta_model(config)
    chosen = set(trained_names(model, asked_patterns(settings)))
    return [(name, p.numel()) for name, p in model.named_parameters() if name in chosen]


def by_part(trained: list[tuple[str, int]]) -> str:
    """Trained parameters as people read them: `vision tower 1,234, projector 567`."""
    parts = {"vision_tower": "vision tower", "multi_modal_projector": "projector", "language_model": "language model"}
    counts = {}
    for name, count in trained:
        part = next((words for key, words in parts.items() if f"{key}." in name), "language model")  # its head
        counts[part] = counts.get(part, 0) + count
    return ", ".join(f"{part} {count:,}" for part, count in counts.items())


def base_bytes(config: LavinConfig, settings: Settings, trained: int = 0) -> int:
    """Bytes of all of the base's weights in the dtype that the run loads them in; `trained` values are in float32."""
    dtype = settings["dtype"]
    if dtype in (None, "auto"):
        dtype = getattr(config, "dtype", None) or config.text_config.dtype or torch.float32
    size = (getattr(torch, dtype) if isinstance(dtype, str) else dtype).itemsize
    total = sum(p.numel() for p in meta_model(config).parameters())
    return (total - trained) * size + trained * 4


def rounding_warning(config: LavinConfig, settings: Settings) -> list[str]:
    """A warning, if the weights that are not trained would be written in fewer digits than they came in."""
    if asked_patterns(settings) is not None and settings.deepspeed and settings["bf16"]:
        return ["DeepSpeed with `bf16: true` keeps, and writes, all weights in bfloat16: `--bf16 false` rounds none."]
    stored = str(getattr(config, "dtype", None) or config.text_config.dtype or "").removeprefix("torch.")
    if asked_patterns(settings) is None or settings["dtype"] not in LOW or settings["dtype"] == stored:
        return []
    return [
        f"the weights that are not trained come in {stored or 'their own dtype'} and are rounded to "
        f"{settings['dtype']} in what is written; `dtype: float32` writes them as they are."
    ]
