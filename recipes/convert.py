"""Reads an adapter checkpoint of the reference implementation of LaVIN into a LaVIN folder."""

import argparse
import os
import pickle
import re
from pathlib import Path

import torch
from peft import inject_adapter_in_model
from transformers.utils import logging

from lavin import MMAConfig
from lavin.adapters_lavin import MLP_NAMES
from lavin.files_lavin import ADAPTER_NAME
from lavin.pair import config_of_pair

from .convert_pool import convert_pool, has_pool_adapter
from .init import check_new_folder, load_pair, meta_model, pair_processor, write_folder


logger = logging.get_logger(__name__)

# Names of the reference: LLaMA's blocks lie at the root, CLIP's under `backbone.visual`.
BLOCKS = {"language_model": "layers", "vision_tower": "backbone.visual.transformer.resblocks"}
ADAPTER = re.compile(rf"({'|'.join(BLOCKS)})\..*?(\d+)\.(\w+)\.adapter_(down|up|router)\.{ADAPTER_NAME}\.(\w+)$")
PROJECTOR = re.compile(r"multi_modal_projector\..*linear_([12])\.(\w+)$")
LANGUAGE_MODEL = re.compile(
    r"(^|\.)(tok_embeddings|embed_tokens|attention\.wq|self_attn\.q_proj|lm_head|output)\.weight$"
)
NO_RESIDUAL = (
    "This adapter's vision tower has no router (`visual_adapter_type` normal): there the reference leaves out the "
    "residual, and LaVIN does not. The converted model computes something else than the one that was trained: train "
    "it further before you use it."
)


def convert_checkpoint(
    checkpoint: str | os.PathLike,
    text_model: str | os.PathLike,
    vision_model: str | os.PathLike,
    output: str | os.PathLike,
    full: bool = False,
    text_revision: str | None = None,
    vision_revision: str | None = None,
    vision_feature_layers: list[int] | None = None,
    preprocessing: str = "lavin",
    adapter_dim: int | None = None,
    adapter_scale: float | None = None,
    temperature: float | None = None,
    hidden_proj: int | None = None,
    adapter_type: str | None = None,
    visual_adapter_type: str | None = None,
    groups: int | None = None,
    pool_size: int | None = None,
    image_size: int | None = None,
    **hub,
) -> tuple[Path, bool]:
    r"""
    Writes a LaVIN folder from a released adapter checkpoint (`checkpoint-N.pth`) and its two base checkpoints. A file
    with InfMLLM's pool-adapter is read by [`convert_pool`].

    Args:
        checkpoint (`str` or `os.PathLike`): File with the dict `{"model": ..., "args": ...}`.
        text_model, vision_model (`str` or `os.PathLike`):
            Folders or Hub names of the base the adapter was trained on: a LLaMA or Vicuna in transformers' format, and
            CLIP ViT-L/14.
        output (`str` or `os.PathLike`): A new or empty folder.
        full (`bool`, *optional*, defaults to `False`): Write the base weights too.
        text_revision, vision_revision (`str`, *optional*): Branch, tag or commit of each base.
        vision_feature_layers (`list[int]`, *optional*): Blocks that are read; every fourth by default.
        preprocessing (`str`, *optional*, defaults to `"lavin"`): See [`LavinProcessor`].
        adapter_dim, adapter_scale, temperature, hidden_proj, adapter_type, visual_adapter_type (*optional*):
            Hyper-parameters under the reference's names. By default those stored in the file's `args`; what is not
            there is read off the weights, where it shows in them.
        groups (`int`, *optional*): Blocks of the up maps; read off the weights.
        pool_size, image_size (`int`, *optional*): As in [`LavinConfig`]; the first for a pool-adapter only.
        hub: `token`, `cache_dir` and the like.

    Returns:
        `tuple`: the folder, and whether a processor was written (not, where `text_model` has no tokenizer).

    Raises:
        `OSError`: if a file or a base checkpoint cannot be reached.
        `ValueError`: if the file is of another kind, or does not fit the base. Nothing has been written then.
    """
    check_new_folder(output)
    weights, stored = read_checkpoint(checkpoint)
    given = {
        "adapter_dim": adapter_dim,
        "adapter_scale": adapter_scale,
        "temperature": temperature,
        "hidden_proj": hidden_proj,
        "adapter_type": adapter_type,
        "visual_adapter_type": visual_adapter_type,
        "groups": groups,
    }
    if has_pool_adapter(weights):
        settings = {**given, "vision_feature_layers": vision_feature_layers}
        if other := [f"--{key.replace('_', '-')}" for key, value in settings.items() if value is not None]:
            raise ValueError(f"{checkpoint} is InfMLLM's pool-adapter, which has no {', '.join(other)}: leave it out.")
        towers = {"text_revision": text_revision, "vision_revision": vision_revision, "preprocessing": preprocessing}
        return convert_pool(
            weights,
            stored,
            checkpoint,
            text_model,
            vision_model,
            output,
            full,
            pool_size=pool_size,
            image_size=image_size,
            **towers,
            **hub,
        )
    if pool_size is not None:
        raise ValueError(f"{checkpoint} is an adapter of LaVIN, which has no --pool-size: leave it out.")
    settings = hyper_parameters(weights, stored, given, checkpoint)
    adapter = MMAConfig(
        r=settings["adapter_dim"],
        groups=settings["groups"],
        scale=float(settings["adapter_scale"]),
        router_temperature=float(settings["temperature"]),
        text_mlp=settings["adapter_type"] == "block",
        vision_mlp=settings["visual_adapter_type"] == "router_block",
        vision_router=settings["visual_adapter_type"] != "normal",
    )
    config, generation_config = config_of_pair(
        vision_model,
        text_model,
        vision_revision,
        text_revision,
        hub=hub,
        projector_hidden_size=settings["hidden_proj"],
        vision_feature_layers=vision_feature_layers,
        image_size=image_size,
    )
    processor = pair_processor(config, preprocessing, hub)
    # Everything is compared on a model without weights, before anything is loaded or written.
    model = meta_model(config, generation_config)
    inject_adapter_in_model(adapter, model, ADAPTER_NAME)
    tensors = renamed(weights, model, f"{checkpoint} does not fit {text_model} and {vision_model}:")
    if full:
        model = load_pair(config, hub)
        inject_adapter_in_model(adapter, model, ADAPTER_NAME)
    model._hf_peft_config_loaded = True
    model.load_state_dict(tensors, strict=False, assign=True)
    write_folder(model, processor, output, full)
    if not adapter.vision_router:
        logger.warning(NO_RESIDUAL)
    return Path(output), processor is not None


def read_checkpoint(file: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict]:
    """
    The adapter's weights by the reference's names, and the stored arguments. Only tensors, plain values and
    `argparse.Namespace` are unpickled.

    Raises:
        `OSError`: if there is no such file.
        `ValueError`: if it is of another kind; the message says which and what to do.
    """
    way_out = (
        "`lavin convert` reads the `checkpoint-N.pth` that the reference implementation of LaVIN writes, or a state "
        "dict with InfMLLM's pool-adapter."
    )
    if os.path.isdir(file):
        raise ValueError(f"{file} is a folder. {way_out}")
    with open(file, "rb") as handle:
        head = handle.read(9)
    if head[:1] in (b"{", b"["):
        raise ValueError(
            f"{file} is a JSON file. {way_out} Where it is an adapter_config.json, PEFT loads its folder."
        )
    if head[8:] == b"{":
        raise ValueError(
            f"{file} is a safetensors file, which the reference does not write. {way_out} A folder with an `mma/` in "
            "it needs no conversion: `AutoModel.from_pretrained(folder, trust_remote_code=True)`."
        )
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, AttributeError, TypeError) as error:
        found = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        cause = (
            f"it holds a {found[1]}, which is not read for safety" if found else "it is no PyTorch checkpoint, or cut"
        )
        raise ValueError(f"{file} cannot be read: {cause}. {way_out}") from error
    weights = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, torch.Tensor) for value in weights.values()):
        raise ValueError(f"{file} holds no dict of weights under `model`. {way_out}")
    weights = {str(key).removeprefix("module."): value for key, value in weights.items()}
    args = content.get("args") or {}
    args = args if isinstance(args, dict) else vars(args)
    if has_pool_adapter(weights):
        return weights, args
    if any(LANGUAGE_MODEL.search(key) for key in weights):
        raise ValueError(
            f"{file} holds a language model's own weights, not an adapter. {way_out} The language model goes into "
            "`--text-model`, in transformers' format."
        )
    if not any("adapter_" in key for key in weights):
        shown = ", ".join(list(weights)[:3]) or "nothing at all"
        raise ValueError(f"{file} holds no weights of LaVIN (no `adapter_` in any name; it holds {shown}). {way_out}")
    return weights, args


def hyper_parameters(weights: dict, stored: dict, given: dict, file) -> dict:
    """
    The reference's hyper-parameters: given ones first, then stored ones, then what the weights show.

    Raises:
        `ValueError`: if one is neither given nor stored and does not show, or has a value that is not known.
    """
    settings = {**seen_in(weights), **{key: stored[key] for key in given if stored.get(key) is not None}}
    settings.update({key: value for key, value in given.items() if value is not None})
    missing = [f"--{key.replace('_', '-')}" for key in given if key not in settings]
    if missing:
        raise ValueError(f"{file} does not say its {', '.join(missing)}, nor do its weights: give them.")
    known = {"adapter_type": ("attn", "block"), "visual_adapter_type": ("router", "router_block", "normal")}
    for key, values in known.items():
        if settings[key] not in values:
            raise ValueError(f"`{key}` must be one of {', '.join(values)}, got {settings[key]!r}.")
    return settings


def seen_in(weights: dict[str, torch.Tensor]) -> dict:
    """What the names and shapes of the weights show of the hyper-parameters."""
    seen, visual = {}, [key for key in weights if key.startswith(BLOCKS["vision_tower"])]
    seen["adapter_type"] = "block" if any(re.match(r"layers\.\d+\.adapter_mlp", key) for key in weights) else "attn"
    seen["visual_adapter_type"] = "router" if any("expert_weights" in key for key in visual) else "normal"
    if any("adapter_mlp" in key for key in visual):
        seen["visual_adapter_type"] = "router_block"
    for key, tensor in weights.items():
        if key.endswith("adapter_attn.conv_A.weight"):
            seen["adapter_dim"] = tensor.shape[0]
        elif key.endswith("adapter_attn.conv_B.weight") and "adapter_dim" in seen and tensor.ndim == 3:
            seen["groups"] = max(1, seen["adapter_dim"] // max(1, tensor.shape[1]))
        elif key == "adapter_proj.conv_A.weight":
            seen["hidden_proj"] = tensor.shape[0]
    return seen


def renamed(weights: dict[str, torch.Tensor], model, problem: str) -> dict[str, torch.Tensor]:
    """
    The weights in float32 under the names they have in `model`, whose adapter says what is expected.

    Raises:
        `ValueError`: lists the keys that are missing, unexpected, or of another shape, all under the file's names.
    """
    tensors, missing, shapes, left = {}, [], [], dict(weights)
    for name, parameter in model.named_parameters():
        if f".{ADAPTER_NAME}." not in name:
            continue
        parts, experts = [], name.endswith((f"adapter_up.{ADAPTER_NAME}.weight", f"adapter_up.{ADAPTER_NAME}.bias"))
        for key in reference_keys(name, parameter):
            if key not in left:
                missing.append(key)
                continue
            tensor = left.pop(key).float()
            # A 1x1 convolution's weight has a third dimension of one.
            tensor = tensor.squeeze(-1) if tensor.ndim == 3 and tensor.shape[-1] == 1 else tensor
            expected = parameter.shape[1:] if experts else parameter.shape
            if tensor.shape != expected:
                shapes.append(f"{key}: {tuple(tensor.shape)} in the file, {tuple(expected)} in this base")
            parts.append(tensor)
        if not (missing or shapes):
            tensors[name] = torch.nn.Parameter(torch.stack(parts) if experts else parts[0], requires_grad=False)
    lines = [problem, *listed("missing", missing), *listed("unexpected", left), *listed("shape", shapes)]
    if len(lines) > 1:
        raise ValueError(
            "\n  ".join(lines) + "\nName the base that the adapter was trained on, or correct its hyper-parameters "
            "(`--adapter-dim`, `--hidden-proj`, `--adapter-type`, `--visual-adapter-type`, `--groups`)."
        )
    return tensors


def listed(kind: str, items, most: int = 40) -> list[str]:
    """One line each; of another base every layer's weights differ, and the first ones say it."""
    lines = [f"{kind}: {item}" for item in items]
    return lines[:most] + ([f"{kind}: {len(lines) - most} more"] if len(lines) > most else [])


def reference_keys(name: str, parameter: torch.Tensor) -> list[str]:
    """The reference's names of a parameter: one, or one for each expert."""
    if match := PROJECTOR.search(name):
        return [f"adapter_proj.conv_{'AB'[int(match[1]) - 1]}.{match[2]}"]
    match = ADAPTER.search(name)
    if match is None:
        return ["adapter_modality_embedding.weight"]
    tower, block, module, part, leaf = match.groups()
    stem = f"{BLOCKS[tower]}.{block}.adapter_{'mlp' if module in MLP_NAMES else 'attn'}"
    leaves = {"down": ["conv_A"], "router": ["expert_weights"], "up": ["conv_B", "conv_D"][: parameter.shape[0]]}
    return [f"{stem}.{kind}.{leaf}" for kind in leaves[part]]
