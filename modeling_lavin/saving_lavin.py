"""Saving a LaVIN folder: what it holds, that nothing is lost or stale in it, and its way to the Hub."""

import copy
import os
import tempfile
from pathlib import Path

import torch
from huggingface_hub import HfApi
from peft import get_peft_model_state_dict
from safetensors import SafetensorError
from transformers.utils import logging

from .adapters_lavin import BASE_KEY, base_name, is_mma
from .card_lavin import write_card
from .configuration_lavin import LavinConfig
from .files_lavin import (
    ADAPTER_CONFIG,
    ADAPTER_NAME,
    ADAPTER_WEIGHTS,
    BASE_WEIGHTS,
    NO_VARIANT,
    PROCESSOR_FILES,
    find_file,
    read_json,
    staged,
    write_adapter,
)
from .trainable_lavin import check_finite, check_trained_finite


logger = logging.get_logger(__name__)
AUTO_MAP = {
    "AutoConfig": "configuration_lavin.LavinConfig",
    "AutoModel": "modeling_lavin.LavinForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_lavin.LavinForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_lavin.LavinForConditionalGeneration",
    "AutoProcessor": "processing_lavin.LavinProcessor",
}


class LavinSavingMixin:
    """Saving and pushing of a LaVIN model."""

    def save_pretrained(
        self, save_directory, full: bool | None = None, is_main_process: bool = True, state_dict=None, **kwargs
    ):
        r"""
        Writes a folder that loads through the Auto classes where `lavin` is not installed.

        Args:
            save_directory (`str` or `os.PathLike`):
                An empty or new folder, or one of a LaVIN.
            full (`bool`, *optional*):
                Whether the base weights are written. By default they are, except where the model has an adapter and
                its base can be named: then the folder is light, some MB. A base that was trained, or has other shapes
                than what was loaded (`resize_token_embeddings`), cannot be named.
            kwargs:
                As of [`PreTrainedModel.save_pretrained`]; `push_to_hub=True` uploads the folder afterwards.

        Raises:
            `ValueError`: if a light folder is asked for, and would lose what was changed in the base. Nothing has been
                written then.
            `FloatingPointError`: if what was trained, or the output of the last training forward, holds NaN or
                infinity. Nothing has been written then.
        """
        if kwargs.pop("variant", None):
            raise ValueError(NO_VARIANT)
        push_to_hub, token = kwargs.pop("push_to_hub", False), kwargs.pop("token", None)
        repo_id = kwargs.pop("repo_id", os.path.basename(os.fspath(save_directory)))
        upload = {key: kwargs.pop(key) for key in ("private", "commit_message") if key in kwargs}
        check_output_folder(save_directory)
        config, adapters = self.config, getattr(self, "peft_config", {})
        adapters = {name: adapter for name, adapter in adapters.items() if not hasattr(adapter, "copy_of")}
        others = [f"{name} ({adapter.peft_type.value})" for name, adapter in adapters.items() if not is_mma(adapter)]
        if others:
            raise ValueError(
                f"A LaVIN folder holds MMA adapters only, and this model has {', '.join(others)}: save "
                "that with PEFT (`PeftModel.save_pretrained`), or delete it first."
            )
        if full is None:
            full = not adapters or not can_be_light(self) or getattr(self, "_is_full_folder", False)
        elif not full and getattr(self, "trained_base", None):
            raise ValueError(
                "A light folder would name the checkpoints that this base was trained from, and lose the training: "
                "save it with `full=True`."
            )
        elif not full and (other := _reshaped(self)):
            raise ValueError(
                f"A light folder would lose what was done to its base: {other} has another shape than the checkpoint "
                "that was loaded (`resize_token_embeddings`, or layers taken out). Save it with `full=True`."
            )
        elif not full and not _is_nameable(config):
            raise ValueError(
                "A light folder names the checkpoints of its base, and this model has none: it was not made from a "
                "pair or a saved folder. Save it with `full=True`."
            )
        if full and adapters and any(parameter.is_meta for parameter in self.parameters()):
            raise ValueError(
                "A part of this base is offloaded (`device_map`), and beside an adapter such weights cannot be "
                "written: save a light folder (`full=False`), or load it without `device_map`."
            )
        if is_main_process:
            _check_nothing_stale(save_directory, config, full, adapters)
            tensors = {name: self._adapter_tensors(name, state_dict) for name in adapters}  # raises before it writes
            check_trained_finite(self, self.state_dict() if state_dict is None else state_dict)
            os.makedirs(save_directory, exist_ok=True)
        if full:
            self._save_base(save_directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs)
        elif is_main_process:
            if local := local_checkpoints(config):
                logger.warning_once(
                    f"This folder's base is on this machine ({', '.join(local)}): it loads here, but pushed as it is "
                    "nobody else could load it."
                )
        if not is_main_process:
            return
        with staged(save_directory) as place:
            if not full:
                self.generation_config.save_pretrained(place)
            self._write_config(place, full)
            for file in Path(__file__).parent.glob("*_lavin.py"):
                Path(place, file.name).write_bytes(file.read_bytes())
            main = ADAPTER_NAME if ADAPTER_NAME in adapters else _active_adapter(self)
            for adapter in adapters:
                # Each under its own name. Where none is named `mma`, the active one is what the folder loads.
                folder = ADAPTER_NAME if adapter == main else adapter
                self._save_adapter(Path(place, folder), adapter, tensors[adapter])
            if not Path(save_directory, PROCESSOR_FILES[0]).exists():
                self._carry_processor(place)
        write_card(self, save_directory)
        if push_to_hub:
            self._upload(save_directory, repo_id, token=token, **upload)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token=None,
        revision: str | None = None,
        create_pr: bool = False,
        full: bool | None = None,
        max_shard_size="5GB",
    ):
        """
        Uploads what [`~LavinFolderMixin.save_pretrained`] writes, the card included. A light folder that names
        checkpoints on this machine is refused.
        """
        upload = {"commit_message": commit_message, "revision": revision, "create_pr": create_pr}
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, full=full, max_shard_size=max_shard_size)
            return self._upload(folder, repo_id, token=token, private=private, **upload)

    def _upload(self, folder, repo_id, token=None, private=None, commit_message=None, **upload):
        check_pushable(folder)
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, exist_ok=True, private=private).repo_id
        # Nothing else that may lie in the folder.
        mine = ["config.json", "generation_config.json", "README.md", "*_lavin.py", *PROCESSOR_FILES, *BASE_WEIGHTS]
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message or "Upload LaVIN",
            allow_patterns=[
                *mine,
                "model-*.safetensors",
                f"*/{ADAPTER_CONFIG}",
                f"*/{ADAPTER_WEIGHTS}",
                ".eval_results/*.yaml",
            ],
            ignore_patterns=["checkpoint-*/*", "_saving-*"],
            **upload,
        )

    def _save_base(self, save_directory, state_dict=None, **kwargs):
        """transformers' own saving, of the model as it is without adapters."""
        quantizer = getattr(self, "hf_quantizer", None)
        if quantizer is not None:
            state_dict, _ = quantizer.get_state_dict_and_metadata(self)
        if state_dict is not None or not any(parameter.is_meta for parameter in self.parameters()):
            state_dict = self.state_dict() if state_dict is None else state_dict
            state_dict = {key.removeprefix(BASE_KEY): value for key, value in state_dict.items()}
            state_dict = {base_name(key): value for key, value in state_dict.items() if base_name(key) is not None}
        loaded, self._hf_peft_config_loaded = getattr(self, "_hf_peft_config_loaded", False), False
        if quantizer is not None:
            self.hf_quantizer = None  # transformers would ask it again, for the names with wrappers
        try:
            super().save_pretrained(save_directory, state_dict=state_dict, **kwargs)
        except SafetensorError as error:  # of a full disk, for example
            raise OSError(f"The base weights cannot be written to {save_directory}: {error}") from error
        finally:
            self._hf_peft_config_loaded = loaded
            if quantizer is not None:
                self.hf_quantizer = quantizer

    def _write_config(self, save_directory, full: bool):
        config = copy.deepcopy(self.config)
        config.auto_map = dict(AUTO_MAP)
        for tower in (config.vision_config, config.text_config):
            tower._name_or_path = ""  # a path of this machine, maybe; `*_checkpoint` names the source
        config.architectures = ["LavinForConditionalGeneration"]
        config.dtype = str(self.get_input_embeddings().weight.dtype).removeprefix("torch.")
        if full:  # it needs no other checkpoint; where they are on the Hub, the card names them
            config.base_checkpoint = None
            if local_checkpoints(config):
                config.text_checkpoint = config.vision_checkpoint = None
        if hasattr(config, "quantization_config") and not full:
            del config.quantization_config
        config.save_pretrained(save_directory)

    def _adapter_tensors(self, adapter_name: str, state_dict=None) -> dict[str, torch.Tensor]:
        """
        Raises:
            `FloatingPointError`: if a value is NaN or infinite, or the last training forward was (DeepSpeed leaves out
                every step whose gradients are not finite, and goes on for ever with weights that are of no use). Not a
                `ValueError`: under ZeRO Trainer takes that for something else and saves again, on one process alone,
                where the others never come.
        """
        if state_dict is not None:
            state_dict = {key.removeprefix(BASE_KEY): value for key, value in state_dict.items()}
        tensors = get_peft_model_state_dict(self, state_dict=state_dict, adapter_name=adapter_name)
        tensors = {BASE_KEY + key.removeprefix(BASE_KEY): value.contiguous().cpu() for key, value in tensors.items()}
        check_finite(self, {key.removeprefix(BASE_KEY): value for key, value in tensors.items()}, "adapter")
        return tensors

    def _save_adapter(self, folder: Path, adapter_name: str, tensors: dict[str, torch.Tensor]):
        folder.mkdir(parents=True, exist_ok=True)
        write_adapter(tensors, folder / ADAPTER_WEIGHTS)
        config = copy.deepcopy(self.peft_config[adapter_name])
        config.inference_mode = True
        config.save_pretrained(folder)

    def _carry_processor(self, save_directory):
        """A folder is complete: the processor of the folder this model came from goes along."""
        source, hub = getattr(self, "source", ("", {}))
        first = PROCESSOR_FILES[0]
        try:
            if not source or not find_file(source, first, hub):
                return
            for name in PROCESSOR_FILES:
                if file := find_file(source, name, hub):
                    Path(save_directory, name).write_bytes(Path(file).read_bytes())
        except OSError as error:
            logger.warning(f"The processor of {source} cannot be reached and is not in {save_directory}: {error}")


def _active_adapter(model) -> str | None:
    return next((module.active_name for module in model.modules() if hasattr(module, "adapter_down")), None)


def _is_nameable(config) -> bool:
    return bool(config.base_checkpoint or (config.text_checkpoint and config.vision_checkpoint))


def can_be_light(model) -> bool:
    """Whether the base's weights are those of the checkpoints it names: frozen, that is, and not trained before."""
    trained = any(p.requires_grad for n, p in model.named_parameters() if base_name(n) is not None)
    return _is_nameable(model.config) and not (trained or getattr(model, "trained_base", None) or _reshaped(model))


def shapes_of(model) -> dict[str, tuple]:
    """Of the base's weights (of quantised ones kernels change it)."""
    named = ((base_name(name), p) for name, p in model.named_parameters() if p.is_floating_point())
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in named if name is not None}


def _reshaped(model) -> str | None:
    """A weight of the base whose shape is not that of the checkpoint that was loaded."""
    loaded, now = getattr(model, "loaded_shapes", {}), shapes_of(model)
    return next((name for name, shape in loaded.items() if now.get(name) != shape), None)


def check_output_folder(folder):
    """
    Raises:
        `ValueError`: if `folder` is a file, cannot be written, or holds a model that is no LaVIN.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise ValueError(f"The output {folder} is a file: name a folder.")
    parent = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"The output folder {folder} cannot be written: check {parent} and its permissions.")
    config = path / "config.json"
    stored = read_json(config) if config.is_file() and config.stat().st_size else None
    if stored is not None and stored.get("model_type") != LavinConfig.model_type:
        raise ValueError(f"The output folder {folder} holds another model (see {config}): name an empty folder.")


def _check_nothing_stale(folder, config, full: bool, adapters):
    """
    Raises:
        `ValueError`: if the folder holds weights that would be loaded in place of what is saved now.
    """
    held = [file for file in BASE_WEIGHTS if Path(folder, file).exists()]
    own = config.base_checkpoint and os.path.abspath(folder) == config.base_checkpoint["name"]
    if held and not full and not own:
        raise ValueError(
            f"{folder} holds base weights ({held[0]}), which would be loaded instead of this light folder's base. "
            "Name another folder, or save with `full=True`."
        )
    if not adapters and Path(folder, ADAPTER_NAME, ADAPTER_WEIGHTS).exists():
        raise ValueError(
            f"{folder} holds an adapter ({ADAPTER_NAME}/), which would be loaded with this model that has none. Name "
            f"another folder, or remove {ADAPTER_NAME}/ there."
        )


def check_pushable(folder):
    """
    Raises:
        `ValueError`: if the folder is light and names checkpoints on this machine.
    """
    if any(Path(folder, file).exists() for file in BASE_WEIGHTS):
        return
    local = local_checkpoints(LavinConfig.from_pretrained(folder))
    if local:
        raise ValueError(
            f"This folder names checkpoints on this machine ({', '.join(local)}), which nobody else can load. Name "
            "Hub checkpoints (`lavin init --vision NAME --text NAME`, or set `config.text_checkpoint` and "
            "`config.vision_checkpoint` to `{'name': ..., 'revision': ...}`), or write the base weights too with "
            "`full=True`."
        )


def local_checkpoints(config: LavinConfig) -> list[str]:
    """The checkpoints a light folder would load from this machine's disk."""
    pair = [config.text_checkpoint, config.vision_checkpoint]
    sources = [config.base_checkpoint] if config.base_checkpoint else pair
    names = [source["name"] for source in sources if source]
    return [name for name in names if os.path.isabs(name) or os.path.isdir(name)]
