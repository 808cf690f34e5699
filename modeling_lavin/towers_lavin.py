"""Reads the weights of the two towers from their own checkpoints, under the names they have in a LaVIN."""

import json
import os
import pickle

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModel
from transformers.initialization import no_init_weights
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from .configuration_lavin import LavinConfig
from .files_lavin import DAMAGED, find_file


WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
NOT_WEIGHTS = ("rotary_emb.inv_freq", "position_ids", "attn.masked_bias", "attn.bias")  # buffers of old checkpoints


def named_base(name, revision: str | None, hub: dict) -> dict:
    """How a config names a checkpoint: a folder by its whole path, a Hub repository by name and commit."""
    if os.path.isdir(name):
        return {"name": os.path.abspath(name), "revision": None}
    file = cached_file(name, "config.json", **{**hub, "revision": revision or "main"})
    return {"name": str(name), "revision": extract_commit_hash(file, None) or revision}


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def has_tokenizer(name, revision: str | None, hub: dict) -> bool:
    """Whether the checkpoint has a tokenizer; without its files transformers makes an empty one of some types."""
    return find_file(name, TOKENIZER_FILES, {**hub, "revision": revision or "main"}) is not None


def tower_config(name, revision: str | None, kind: str, hub: dict):
    """
    A tower's configuration, and how to name its checkpoint.

    Raises:
        `OSError`: if the checkpoint cannot be reached.
        `ValueError`: if transformers does not know its type. The message says which of the two, `kind`, it is.
    """
    name = os.fspath(name)
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise OSError(
            f"The {kind} checkpoint {name} has no config.json: it is not in transformers' format. Convert it "
            "first, or name one that is."
        )
    try:
        config = AutoConfig.from_pretrained(name, revision=revision or "main", **hub)
    except OSError as error:
        at = f" at revision {revision}" if revision else ""
        raise OSError(
            f"The {kind} checkpoint {name}{at} cannot be reached: {_one_line(error)} Check the name, the network "
            "and, for a gated checkpoint, `hf auth login`; or name a folder with the checkpoint in it."
        ) from error
    except ValueError as error:  # a type that transformers does not know, or a config.json that is none
        raise ValueError(
            f"The {kind} checkpoint {name} is no model that transformers knows: {_one_line(error)}"
        ) from error
    return config, named_base(name, revision, hub)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


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
    return {**_vision_keys(vision, config), **_text_keys(text, config)}


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
            raise ValueError(DAMAGED.format(file=file, cause=_one_line(error)[:200])) from error
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
        raise ValueError(DAMAGED.format(file=index, cause=_one_line(error) or type(error).__name__)) from error
    if outside := [shard for shard in shards if shard != os.path.basename(shard)]:
        raise ValueError(f"{index} asks for a file outside its own folder ({outside[0]!r}), which is not read.")
    return shards


def _vision_keys(tensors: dict, config: LavinConfig) -> dict:
    """A tower's own checkpoint, an older one with `vision_model.`, or the vision half of a whole CLIP or SigLIP."""
    with torch.device("meta"), no_init_weights():  # the class: `from_config` would initialise it under ZeRO-3
        expected = set(AutoModel._model_mapping[type(config.vision_config)](config.vision_config).state_dict())
    renamed = {}
    for key, tensor in tensors.items():
        for name in (key, key.removeprefix("vision_model."), f"vision_model.{key}"):
            if name in expected:
                renamed[f"model.vision_tower.{name}"] = tensor
                break
    return renamed


def _text_keys(tensors: dict, config: LavinConfig) -> dict:
    """A causal language model's checkpoint, or a bare decoder's."""
    if "lm_head.bias" in tensors:
        raise ValueError(f"The head of {config.text_config.model_type} has a bias, which LaVIN's has not.")
    prefix = AutoModel._model_mapping[type(config.text_config)].base_model_prefix + "."
    has_prefix = any(key.startswith(prefix) for key in tensors)
    renamed = {}
    for key, tensor in tensors.items():
        if key.endswith(NOT_WEIGHTS) and not key.endswith("c_attn.bias"):
            continue
        if key == "lm_head.weight":
            if not config.tie_word_embeddings:
                renamed[key] = tensor
        elif key.startswith(prefix) or not has_prefix:
            renamed["model.language_model." + key.removeprefix(prefix)] = tensor
    return renamed
