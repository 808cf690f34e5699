"""Reads the weights of the two towers from their own checkpoints, under the names they have in a LaVIN."""

import json
import os
import pickle
from collections.abc import Iterator
from types import SimpleNamespace

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from .configuration_lavin import LavinConfig
from .files_lavin import DAMAGED, find_file, one_line
from .fit_lavin import architecture, on_meta


WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
OLD_BUFFERS = ("inv_freq", "position_ids", "masked_bias")  # of old checkpoints; their causal masks are below
MASKS = ("attn.bias", "attention.bias")


def named_base(name, revision: str | None, hub: dict) -> dict:
    """How a config names a checkpoint: a folder by its whole path, a Hub repository by name and commit."""
    if os.path.isdir(name):
        return {"name": os.path.abspath(name), "revision": None}
    file = cached_file(name, "config.json", **{**hub, "revision": revision or "main"})
    return {"name": str(name), "revision": extract_commit_hash(file, None) or revision}


def read_towers(config: LavinConfig, name, hub: dict) -> dict[str, torch.Tensor]:
    """
    The state dict of a LaVIN's two towers, read from the checkpoints its config names. One dict, so that dtype,
    `device_map` and quantisation act on the whole.

    Args:
        config (`LavinConfig`): with `vision_checkpoint` and `text_checkpoint`.
        name (`str`): of the folder the config is from, for messages.
        hub (`dict`): `token`, `cache_dir` and the like.

    Raises:
        `OSError`: if one of the two cannot be reached.
    """
    vision = _read_checkpoint(config.vision_checkpoint, "vision", name, hub)
    text = _read_checkpoint(config.text_checkpoint, "text", name, hub)
    own = (architecture(AutoModel, config.vision_config), architecture(AutoModelForCausalLM, config.text_config))
    tower, language_model = on_meta(own[0], config.vision_config), on_meta(own[1], config.text_config)
    head = next(n for n, m in language_model.named_modules() if m is language_model.get_output_embeddings())
    tower_keys = names_in(tower, vision, "", config.vision_checkpoint, hub)
    text_keys = names_in(language_model, text, head, config.text_checkpoint, hub)
    tensors = {f"model.vision_tower.{new}": vision[key] for key, new in tower_keys.items()}
    inside = f"{language_model.base_model_prefix}."
    for key, new in text_keys.items():
        if new != f"{head}.weight":
            tensors[f"model.language_model.{new.removeprefix(inside)}"] = text[key]
        elif not config.tie_word_embeddings:
            tensors["lm_head.weight"] = text[key]
    return tensors


def names_in(model, tensors: dict[str, torch.Tensor], head: str, source: dict, hub: dict) -> dict[str, str]:
    """
    The names that a checkpoint's tensors have in a model, found as transformers finds them when it loads one. Tensors
    that become part of a larger one (experts) keep the names they have before that.

    Args:
        model (`PreTrainedModel`): of the architecture's own class, without memory.
        head (`str`): name of its head, if any: all that lies on the way to the logits must have a place.
        source (`dict`): `{"name", "revision"}` of the checkpoint.

    Raises:
        `ValueError`: if a tensor has no place in the model, and is no known part of another model of its checkpoint
            (the text half of a CLIP, a classifier).
    """
    names, left = _find_names(model, tensors)
    ours = [new for new in names.values() if head and not new.startswith((f"{model.base_model_prefix}.", f"{head}."))]
    if left and not ours:
        for whole in _whole_models(type(model), source, hub):
            known, _ = _find_names(whole, {key: tensors[key] for key in left})
            left = [key for key in left if key not in known or (head and key.startswith(f"{head}."))]
    if left or ours:
        shown = ", ".join((left or ours)[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
        raise ValueError(
            f"The checkpoint {source['name']} holds weights that have no place in a LaVIN, and without which its "
            f"{type(model).__name__} is another model: {shown}. Name a checkpoint that this transformers' "
            f"`{type(model).__name__}.from_pretrained` reads with none left over."
        )
    return names


def _find_names(model, tensors: dict[str, torch.Tensor]) -> tuple[dict[str, str], list[str]]:
    """Names in a model by names in a checkpoint, and what is left over."""
    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if not isinstance(each, WeightRenaming)]
    expected, buffers = model.state_dict(), {name for name, _ in model.named_buffers()}
    prefix, names, left = model.base_model_prefix, {}, {}
    for key, tensor in tensors.items():
        # As it is, and as other versions of transformers wrote a CLIP's.
        for own in (key, key.removeprefix("vision_model."), f"vision_model.{key}"):
            new, converted = rename_source_key(own, renamings, converters, prefix, expected)
            if new not in expected:
                plain, _ = rename_source_key(own, [], [], prefix, expected)
                new, converted = (plain, None) if plain in expected else (new, converted)
            if new in expected:
                if converted:
                    start = f"{prefix}." if new.startswith(f"{prefix}.") else ""
                    new = start + rename_source_key(own, renamings, [])[0].removeprefix(f"{prefix}.")
                names[key] = new
                break
        else:
            new = rename_source_key(key, renamings, converters, prefix, expected)[0]
            mask = key.endswith(MASKS) and tensor.ndim == 4
            if not mask and not key.endswith(OLD_BUFFERS) and not {key, new, f"{prefix}.{key}"} & buffers:
                left[new] = key
    info = SimpleNamespace(missing_keys=set(), unexpected_keys=set(left))
    model._adjust_missing_and_unexpected_keys(info)  # what the architecture itself knows to be of no use to it
    return names, [key for new, key in left.items() if new in info.unexpected_keys]


def _whole_models(own: type, source: dict, hub: dict) -> Iterator:
    """Models, without memory, of the other classes that a checkpoint is of by its own configuration."""
    config = AutoConfig.from_pretrained(source["name"], **{**hub, "revision": source.get("revision") or "main"})
    classes = [getattr(transformers, name, None) for name in config.architectures or []]
    for found in dict.fromkeys([*classes, architecture(AutoModel, config)]):
        if found not in (None, own) and isinstance(config, found.config_class):
            yield on_meta(found, config)


def _read_checkpoint(source, kind: str, name, hub: dict) -> dict[str, torch.Tensor]:
    if source is None:
        raise OSError(
            f"{name} holds no weights and names no {kind} checkpoint: pass `{kind}_checkpoint={{'name': ..., "
            "'revision': None}` to `from_pretrained`."
        )
    try:
        files = _weight_files(source["name"], {**hub, "revision": source.get("revision") or "main"})
    except OSError as error:
        raise OSError(
            f"The {kind} checkpoint of {name}, {source['name']} at revision {source.get('revision')}, cannot be "
            f"reached: {error} Put it there, or name another with `from_pretrained(..., {kind}_checkpoint={{'name': "
            "..., 'revision': None})`."
        ) from error
    tensors = {}
    for file in files:
        try:
            if file.endswith(".safetensors"):
                with safe_open(file, framework="pt") as handle:
                    tensors.update({key: handle.get_tensor(key) for key in handle.keys()})
            else:  # tensors and plain values only: no code of a pickle is run
                tensors.update(torch.load(file, map_location="cpu", weights_only=True))
        except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, TypeError, ValueError) as error:
            raise ValueError(DAMAGED.format(file=file, cause=one_line(error)[:200])) from error
    return tensors


def _weight_files(name, hub: dict) -> list[str]:
    if not os.path.isdir(name):
        find_file(name, "config.json", hub)
        AutoConfig.from_pretrained(name, **hub)  # says why a repository cannot be reached
    path = find_file(name, WEIGHT_FILES, hub)
    if path is None:
        raise OSError(f"{name} has no weights ({', '.join(WEIGHT_FILES)}).")
    if not path.endswith(".json"):
        return [path]
    found = {shard: find_file(name, shard, hub) for shard in shards_of(path)}
    if missing := [shard for shard, file in found.items() if file is None]:
        raise OSError(f"{name} has no {missing[0]}, which its {os.path.basename(path)} names.")
    return list(found.values())


def shards_of(index: str) -> list[str]:
    """
    The files that an index of weights names.

    Raises:
        `ValueError`: if it is damaged, or names a file outside its own folder.
    """
    try:
        with open(index, encoding="utf-8") as file:
            shards = sorted(set(json.load(file)["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(DAMAGED.format(file=index, cause=one_line(error) or type(error).__name__)) from error
    if outside := [shard for shard in shards if shard != os.path.basename(shard)]:
        raise ValueError(f"{index} asks for a file outside its own folder ({outside[0]!r}), which is not read.")
    return shards
