"""
What a LaVIN folder holds, and how it is loaded and saved.

The root of every folder has config, code, processor and card. A full folder has the base weights as well; a light one
names the checkpoints they come from. The adapter lies in `mma/`, because it is the PEFT adapter named `mma`: at the
root, the Hub's Auto classes would take the whole repository for an adapter of something else.
"""

import contextlib
import copy
import os
import re
import tempfile
from pathlib import Path

import torch
from huggingface_hub import HfApi
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, inject_adapter_in_model
from peft import __version__ as peft_version
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig
from transformers.utils import logging

from .adapters_lavin import LavinAdapterMixin, check_no_mma, is_mma
from .card_lavin import write_card
from .configuration_lavin import CHECKPOINTS, OWN_FIELDS, LavinConfig, vision_part
from .files_lavin import DAMAGED, find_file, read_adapter, read_json, staged, write_adapter
from .fit_lavin import check_text, check_vision
from .peft_lavin import with_adapter
from .towers_lavin import has_tokenizer, named_base, read_towers, shards_of, tower_config
from .trainable_lavin import (
    BOTH,
    EXISTING_ADAPTER,
    QUANTISED,
    check_finite,
    check_patterns,
    check_trained_finite,
    set_trainable,
    trained_names,
)
from .tuner_lavin import MMAConfig, adapter_tensors, all_or_nothing, check_not_diverged, find_lavin, lift_to_float32
from .versions_lavin import check_versions


logger = logging.get_logger(__name__)

ADAPTER_NAME = "mma"
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
BASE_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.jinja",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "proxies")
AUTO_MAP = {
    "AutoConfig": "configuration_lavin.LavinConfig",
    "AutoModel": "modeling_lavin.LavinForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_lavin.LavinForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_lavin.LavinForConditionalGeneration",
    "AutoProcessor": "processing_lavin.LavinProcessor",
}
MARK = {"format": "pt", "adapter": f"in {ADAPTER_NAME}/; this file has no tensors"}
PEFT_SAVES = ("push_to_hub", "repo_id", "token", "private", "variant")
NO_VARIANT = (
    "LaVIN folders have no `variant`: load and save without it. `from_pretrained(..., dtype=...)` chooses the dtype "
    "of weights; those of another dtype go to a folder of their own."
)
BASE_KEY = "base_model.model."  # PEFT writes adapter keys as a PeftModel names them


class LavinFolderMixin(LavinAdapterMixin):
    """Loading and saving of a LaVIN model; see the module's text for the layout."""

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path,
        *model_args,
        mma: dict | None = None,
        trainable: list[str] | None = None,
        peft: dict | None = None,
        **kwargs,
    ):
        r"""
        Loads a LaVIN from a light or a full folder, or from the Hub.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`):
                Folder or Hub name.
            mma (`dict`, *optional*):
                Fields of [`MMAConfig`], or `{}` for its defaults: returns a [`LavinPeftModel`] whose adapter is ready
                to train. A folder that holds an adapter continues with it; other values than the stored ones are an
                error. Without it everything is frozen and the folder's adapter, if any, is active.
            trainable (`list[str]`, *optional*):
                Instead of `mma`: regular expressions, looked for in the names of the base's parameters, that say which
                are trained, in float32 whatever `dtype` is (in bfloat16 most steps would round to nothing; with such a
                `dtype` train under autocast, `bf16: true`). All others stay frozen. Saving then writes a full folder.
            peft (`dict`, *optional*):
                Instead of `mma`: `peft_type` and fields of one of PEFT's own configs (LoRA, IA3, adaption prompts):
                returns a [`~peft.PeftModel`] that trains this adapter and the projector. It saves as PEFT does.
            kwargs:
                As of [`PreTrainedModel.from_pretrained`]; dtype, `device_map` and quantisation act on the whole.
                `text_checkpoint` and `vision_checkpoint` name other checkpoints than the folder's.

        Raises:
            `OSError`: if a checkpoint the folder names cannot be reached; the message says which and what to do.
            `ValueError`: if `mma` differs from the stored adapter, the adapter does not fit the base, `trainable`
                names nothing that can be trained, or comes with `mma`, an adapter or a quantised base; if `peft` is no
                config of PEFT's, or comes with another way to train.
        """
        name = pretrained_model_name_or_path
        check_versions()
        _check_ways(mma, trainable, peft, kwargs)
        if name is None:
            return super().from_pretrained(None, *model_args, **kwargs)
        if kwargs.pop("subfolder", None):
            raise ValueError("A LaVIN folder is a whole repository: pass its own path or name, not a `subfolder`.")
        hub = {key: kwargs[key] for key in HUB_ARGUMENTS if kwargs.get(key) is not None}
        if "torch_dtype" in kwargs:  # its name in transformers 4
            kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
        if kwargs.get("dtype") == "auto":  # the default, which the configuration would take for a dtype
            del kwargs["dtype"]
        config = kwargs.pop("config", None)
        if getattr(config, "model_type", None) != LavinConfig.model_type:  # another import's LavinConfig will do
            if file := find_file(name, "config.json", hub):  # says what is missing where the Hub is out of reach
                read_json(file)
            found = LavinConfig.get_config_dict(name, **hub)[0].get("model_type")
            if found != LavinConfig.model_type:
                raise ValueError(
                    f"{name} is no LaVIN (its type is {found}). `from_vision_text_pretrained(vision, text)` makes one "
                    "from a vision tower and a language model."
                )
            config, kwargs = cls.config_class.from_pretrained(name, return_unused_kwargs=True, **{**kwargs, **hub})
            kwargs.update(hub)
        config = copy.deepcopy(config)
        for kind in CHECKPOINTS:  # the Auto classes set such arguments on the config as they are
            source = kwargs.pop(kind, getattr(config, kind))
            setattr(config, kind, {"name": source, "revision": None} if isinstance(source, str) else source)
        if os.path.isfile(os.path.join(name, ADAPTER_CONFIG)):
            raise ValueError(
                f"{name} has an {ADAPTER_CONFIG} at its root, where transformers takes the whole folder for an "
                f"adapter of something else. Move it, with its weights, to {ADAPTER_NAME}/ if it is an MMA adapter's, "
                "else to a folder of its own, for `load_adapter` or `PeftModel.from_pretrained`."
            )
        has_adapter = find_file(name, f"{ADAPTER_NAME}/{ADAPTER_CONFIG}", hub) is not None
        if peft is not None and has_adapter:
            raise ValueError(f"{name} holds an MMA adapter ({ADAPTER_NAME}/): name its base to train another on it.")
        if trainable is not None:
            if has_adapter:
                raise ValueError(EXISTING_ADAPTER.format(name=name, adapter=ADAPTER_NAME))
            if getattr(config, "quantization_config", None) is not None:
                raise ValueError(QUANTISED)
            config.trained_patterns = list(trainable)  # for `_get_dtype_plan`
        check_text(config.text_config, f"The language model of {name}")
        with_info = kwargs.pop("output_loading_info", False)
        weights = find_file(name, BASE_WEIGHTS, hub)
        full = weights is not None
        if full:
            if weights.endswith(".json"):
                shards_of(weights)
            with _explained(name):
                model, info = super().from_pretrained(
                    name, *model_args, config=config, output_loading_info=True, **kwargs
                )
            model.config.base_checkpoint = named_base(name, hub.get("revision"), hub)
        elif config.base_checkpoint is not None:
            model, info = cls._from_base_checkpoint(name, config, model_args, kwargs)
        else:
            plain = {key: value for key, value in kwargs.items() if key not in HUB_ARGUMENTS}
            state_dict = read_towers(config, name, {key: value for key, value in hub.items() if key != "revision"})
            with _explained(name):
                model, info = super().from_pretrained(
                    None, *model_args, config=config, state_dict=state_dict, output_loading_info=True, **plain
                )
        if not with_info:  # who asks for the loading info looks at it
            _check_complete(info, name)
        if not full and model.can_generate() and (file := find_file(name, "generation_config.json", hub)):
            read_json(file)
            model.generation_config = GenerationConfig.from_pretrained(name, **hub)
        model._is_full_folder = full
        model.source = (str(name), hub)
        model.config._name_or_path = model.name_or_path = str(name)
        _freeze(model)
        if peft is not None:
            model = with_adapter(model, peft)
        if mma is not None:
            stored = _stored_config(name, ADAPTER_NAME, hub) if has_adapter else None
            model = LavinPeftModel(model, _trainable_config(mma, stored, name), adapter_name=ADAPTER_NAME)
            if has_adapter:
                set_adapter_weights(model, _adapter_weights(name, ADAPTER_NAME, hub), ADAPTER_NAME)
        elif has_adapter:
            model.load_adapter(name, adapter_name=ADAPTER_NAME, adapter_kwargs={"subfolder": ADAPTER_NAME, **hub})
        return (model, info) if with_info else model

    @classmethod
    def _from_base_checkpoint(cls, name, config, model_args, kwargs):
        base = config.base_checkpoint
        arguments = {**kwargs, "revision": base.get("revision") or "main", "output_loading_info": True}
        try:
            return super().from_pretrained(base["name"], *model_args, config=config, **arguments)
        except OSError as error:
            raise OSError(
                f"The base of {name}, the full LaVIN folder {base['name']}, cannot be reached: {error} Put it there, "
                "or name another with `from_pretrained(..., base_checkpoint={'name': ..., 'revision': None})`."
            ) from error

    @classmethod
    def from_vision_text_pretrained(
        cls, vision, text, vision_revision: str | None = None, text_revision: str | None = None, **kwargs
    ):
        r"""
        Builds a LaVIN from a vision tower and a language model, both loaded in one go.

        Args:
            vision (`str`): Folder or Hub name of a CLIP or SigLIP tower, or of a whole CLIP or SigLIP checkpoint.
            text (`str`): Folder or Hub name of a decoder-only language model.
            vision_revision, text_revision (`str`, *optional*): Branch, tag or commit of each.
            kwargs: Fields of [`LavinConfig`], and arguments of [`PreTrainedModel.from_pretrained`], `mma`,
                `trainable` and `peft` included.
        """
        overrides = {key: kwargs.pop(key) for key in OWN_FIELDS if key in kwargs}
        hub = {key: kwargs.pop(key) for key in HUB_ARGUMENTS if key in kwargs}
        mma, trainable, peft = (kwargs.pop(key, None) for key in ("mma", "trainable", "peft"))
        _check_ways(mma, trainable, peft, kwargs)
        config, generation_config = config_of_pair(vision, text, vision_revision, text_revision, hub=hub, **overrides)
        if trainable is not None:
            config.trained_patterns = list(trainable)
        state_dict = read_towers(config, f"the pair {vision} and {text}", hub)
        model, info = super().from_pretrained(
            None, config=config, state_dict=state_dict, output_loading_info=True, **kwargs
        )
        _check_complete(info, f"the pair {vision} and {text}")
        if model.can_generate():
            model.generation_config = generation_config
        model._is_full_folder = False
        model.config._name_or_path = model.name_or_path = ""  # no folder yet
        _freeze(model)
        if peft is not None:
            return with_adapter(model, peft)
        if mma is None:
            return model
        return LavinPeftModel(model, _trainable_config(mma, None, text), adapter_name=ADAPTER_NAME)

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict:
        """What is trained is read in float32 from the start: not a bit of it is lost on the way."""
        plan, patterns = super()._get_dtype_plan(dtype), getattr(self.config, "trained_patterns", None)
        if patterns is not None:
            plan.update((f"^{re.escape(name)}$", torch.float32) for name in trained_names(self, patterns))
        return plan

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
            full = not adapters or not _can_be_light(self) or getattr(self, "_is_full_folder", False)
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
            state_dict = {_base_name(key): value for key, value in state_dict.items() if _base_name(key) is not None}
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

    def load_adapter(
        self, peft_model_id=None, adapter_name=None, peft_config=None, adapter_state_dict=None,
        is_trainable: bool = False, adapter_kwargs: dict | None = None, **kwargs,
    ):  # fmt: skip
        """
        Loads an adapter beside those that are there and makes it the active one. An MMA adapter is looked for in
        `mma/` of a folder or Hub repository, or in `adapter_kwargs={"subfolder": ...}`; other types load as in
        transformers.
        """
        if peft_model_id is None and (peft_config is None or adapter_state_dict is None):
            raise ValueError("Pass a folder or a Hub name, or both `peft_config` and `adapter_state_dict`.")
        adapter_name = adapter_name or ADAPTER_NAME
        hub = {**{key: kwargs[key] for key in HUB_ARGUMENTS if kwargs.get(key) is not None}, **(adapter_kwargs or {})}
        if kwargs.get("subfolder"):
            hub["subfolder"] = kwargs.pop("subfolder")
        if peft_config is None:
            folder = hub.pop("subfolder", None)
            if folder is None:
                folder = ADAPTER_NAME if find_file(peft_model_id, f"{ADAPTER_NAME}/{ADAPTER_CONFIG}", hub) else ""
            peft_config = _stored_config(peft_model_id, folder, hub)
            if not is_mma(peft_config):
                check_no_mma(self, peft_config)
                with all_or_nothing(self):
                    return super().load_adapter(
                        peft_model_id, adapter_name, is_trainable=is_trainable, adapter_kwargs=adapter_kwargs, **kwargs
                    )
            adapter_state_dict = _adapter_weights(peft_model_id, folder, hub)
        elif getattr(peft_config, "peft_type", "MMA") != "MMA":
            check_no_mma(self, peft_config)
            given = {"peft_config": peft_config, "adapter_state_dict": adapter_state_dict}
            with all_or_nothing(self):
                return super().load_adapter(peft_model_id, adapter_name, **given, **kwargs)
        elif isinstance(peft_config, dict):
            peft_config = MMAConfig(**{k: v for k, v in peft_config.items() if k not in ("peft_type", "task_type")})
        if adapter_name in getattr(self, "peft_config", {}):
            raise ValueError(f"Adapter with name {adapter_name} already exists. Please use a different name.")
        peft_config.inference_mode = not is_trainable
        with all_or_nothing(self):
            inject_adapter_in_model(peft_config, self, adapter_name)
            self._hf_peft_config_loaded = True
            set_adapter_weights(self, adapter_state_dict, adapter_name)
            self.set_adapter(adapter_name)
        if not is_trainable:
            self.eval()


class Adapters(dict):
    """
    Adapters by name. TRL's preference trainers ask for `"default"`, PEFT's usual name for what is trained, to add a
    copy of it as their reference: they get the config of such a copy.
    """

    def __missing__(self, name):
        if name != "default" or ADAPTER_NAME not in self:
            raise KeyError(name)
        config = copy.copy(self[ADAPTER_NAME])
        config.copy_of = ADAPTER_NAME
        return config


class LavinPeftModel(PeftModel):
    """
    A LaVIN whose adapter is ready to train. Saving writes a complete adapter repository (config, code, `mma/`, card),
    so that every checkpoint of `trl sft` loads through `AutoModel`.
    """

    # TRL casts everything that is trained to bfloat16 where it sees one of these flags; in bfloat16 most of it would
    # hardly move. (`is_quantized`, which Trainer asks for, stays what it is.)
    is_loaded_in_4bit = is_loaded_in_8bit = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.peft_config = self.get_base_model().peft_config = Adapters(self.peft_config)

    def add_adapter(self, adapter_name: str, peft_config, **kwargs):
        """As in PEFT. The reference of TRL's preference trainers starts with the weights of what is trained."""
        super().add_adapter(adapter_name, peft_config, **kwargs)
        if source := getattr(peft_config, "copy_of", None):
            set_adapter_weights(self, adapter_tensors(self, source), adapter_name)

    def load_adapter(self, model_id, adapter_name: str = ADAPTER_NAME, is_trainable: bool = False, **kwargs):
        """
        As in PEFT, of a LaVIN folder the adapter in its `mma/`. One that is there gets other weights; names, shapes
        and settings are compared before anything changes.
        """
        hub = {key: kwargs[key] for key in HUB_ARGUMENTS if kwargs.get(key) is not None}
        folder = kwargs.get("subfolder")
        if folder is None:
            folder = ADAPTER_NAME if find_file(model_id, f"{ADAPTER_NAME}/{ADAPTER_CONFIG}", hub) else ""
        result = torch.nn.modules.module._IncompatibleKeys([], [])
        is_new = adapter_name not in self.peft_config
        if is_new and adapter_name == "default" and _is_marked(model_id):
            return result  # Trainer, which goes on from a checkpoint, and loads `mma/` next
        config, weights = _stored_config(model_id, folder, hub), _adapter_weights(model_id, folder, hub)
        if not is_mma(config):
            raise ValueError(f"{model_id} holds a {config.peft_type.value} adapter: beside MMA, train on its own.")
        config.inference_mode = not is_trainable
        if is_new:
            self.add_adapter(adapter_name, config)
            self.set_requires_grad(adapter_name, is_trainable)
        own = self.peft_config[adapter_name]
        for key in ("scale", "router_temperature"):  # others show in names and shapes
            if getattr(config, key) != getattr(own, key):
                raise ValueError(
                    f"The adapter in {model_id} was trained with `{key}` {getattr(config, key)}, and {adapter_name!r} "
                    f"has {getattr(own, key)}: load it under another name, or start with its own settings."
                )
        try:
            set_adapter_weights(self, weights, adapter_name)
        except ValueError:
            if is_new:
                self.delete_adapter(adapter_name)
            raise
        if not is_trainable:
            self.eval()
        return result

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """As in torch; of weights that are all another model's nothing is passed over in silence."""
        if state_dict and not state_dict.keys() & self.state_dict().keys():
            raise ValueError(
                "These are weights of a base without its adapter, as in a full folder, and Trainer reads nothing else "
                "of one: a run cannot go on from it. Start from it instead: `from_pretrained(folder, mma={})`."
            )
        return super().load_state_dict(state_dict, strict, assign)

    def save_pretrained(self, save_directory, is_main_process: bool = True, state_dict=None, full=None, **kwargs):
        full = False if full is None and _can_be_light(self.get_base_model()) else full
        kwargs = {key: value for key, value in kwargs.items() if key in PEFT_SAVES}
        self.get_base_model().save_pretrained(
            save_directory, full=full, is_main_process=is_main_process, state_dict=state_dict, **kwargs
        )
        if is_main_process and re.fullmatch(r"checkpoint-\d+", Path(save_directory).name):
            # Where there is a file of this name, Trainer has `load_adapter` load the best checkpoint at the end.
            save_file({}, Path(save_directory, ADAPTER_WEIGHTS), metadata=MARK)

    def push_to_hub(self, repo_id: str, **kwargs):
        kwargs.setdefault("full", False if _can_be_light(self.get_base_model()) else None)
        return self.get_base_model().push_to_hub(repo_id, **kwargs)


def _is_marked(folder) -> bool:
    file = Path(folder, ADAPTER_WEIGHTS)
    if not file.is_file():
        return False
    with safe_open(file, framework="pt") as opened:
        return opened.metadata() == MARK


def _active_adapter(model) -> str | None:
    return next((module.active_name for module in model.modules() if hasattr(module, "adapter_down")), None)


def _is_nameable(config) -> bool:
    return bool(config.base_checkpoint or (config.text_checkpoint and config.vision_checkpoint))


def _can_be_light(model) -> bool:
    """Whether the base's weights are those of the checkpoints it names: frozen, that is, and not trained before."""
    trained = any(p.requires_grad for n, p in model.named_parameters() if _base_name(n) is not None)
    return _is_nameable(model.config) and not (trained or getattr(model, "trained_base", None) or _reshaped(model))


def _shapes(model) -> dict[str, tuple]:
    """Of the base's weights (of quantised ones kernels change it)."""
    named = ((_base_name(name), p) for name, p in model.named_parameters() if p.is_floating_point())
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in named if name is not None}


def _reshaped(model) -> str | None:
    """A weight of the base whose shape is not that of the checkpoint that was loaded."""
    loaded, now = getattr(model, "loaded_shapes", {}), _shapes(model)
    return next((name for name, shape in loaded.items() if now.get(name) != shape), None)


def config_of_pair(vision, text, vision_revision=None, text_revision=None, hub=None, **overrides):
    """
    The configuration of a LaVIN made of two checkpoints, which it names with their commits, and the generation
    configuration that belongs to it.

    Returns:
        `tuple(LavinConfig, GenerationConfig)`
    """
    from .processing_lavin import LavinProcessor

    hub = {key: value for key, value in (hub or {}).items() if key != "revision"}
    vision_config, vision_checkpoint = tower_config(vision, vision_revision, "vision", hub)
    text_config, text_checkpoint = tower_config(text, text_revision, "text", hub)
    check_vision(vision_part(vision_config), vision)
    check_text(text_config.get_text_config(decoder=True), text)
    tokenizer = None
    if has_tokenizer(text, text_revision, hub):
        processor = LavinProcessor.from_vision_text_pretrained(
            vision, text, vision_revision=vision_revision, text_revision=text_revision, **hub
        )
        tokenizer = processor.tokenizer
        overrides.setdefault("image_token_id", processor.image_token_id)
    config = LavinConfig(
        vision_config=vision_config,
        text_config=text_config,
        vision_checkpoint=vision_checkpoint,
        text_checkpoint=text_checkpoint,
        **overrides,
    )
    try:
        generation = GenerationConfig.from_pretrained(text, revision=text_revision or "main", **hub)
    except OSError:
        generation = GenerationConfig.from_model_config(text_config)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(generation, name) is None:
            setattr(generation, name, getattr(tokenizer, name, None))
    return config, generation


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


def set_adapter_weights(model, weights: dict[str, torch.Tensor], adapter_name: str):
    """Sets an adapter's weights, float32 whatever the base's dtype, after comparing names and shapes."""
    check_not_diverged(weights)
    lift_to_float32(model, adapter_name)
    weights = {key.removeprefix(BASE_KEY): value for key, value in weights.items()}
    if model.base_model_prefix and not hasattr(model, model.base_model_prefix):  # a LavinModel without its head
        weights = {key.removeprefix(f"{model.base_model_prefix}."): value for key, value in weights.items()}
    own = {key.removeprefix(BASE_KEY): value for key, value in adapter_tensors(model, adapter_name).items()}
    problems = [f"missing: {key}" for key in own if key not in weights]
    problems += [f"unexpected: {key}" for key in weights if key not in own]
    problems += [
        f"{key}: {tuple(value.shape)} in the adapter, {tuple(own[key].shape)} in this model"
        for key, value in sorted(weights.items())  # a safetensors file has no order
        if key in own and own[key].shape != value.shape
    ]
    away = [key for key, tensor in own.items() if tensor.is_meta and not weights.get(key, tensor).is_meta]
    problems += [f"{key}: offloaded, so it cannot be set" for key in away]
    if problems:
        shown = "\n  ".join(problems[:8]) + (f"\n  and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise ValueError(f"The adapter belongs to another base or has other settings:\n  {shown}")
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(weights[key])
    find_lavin(model).routing.forget()


def _check_ways(mma, trainable, peft, kwargs: dict):
    """
    Raises:
        `ValueError`: if there are two ways to train, or `trainable` is for weights that will be quantised.
    """
    if kwargs.get("variant"):
        raise ValueError(NO_VARIANT)
    if peft is not None and (mma is not None or trainable is not None):
        raise ValueError("`peft`, `mma` and `trainable` are three ways to train a model: pass one of them.")
    if trainable is None:
        return
    check_patterns(trainable)
    if mma is not None:
        raise ValueError(BOTH)
    if any(kwargs.get(key) for key in ("quantization_config", "load_in_4bit", "load_in_8bit")):
        raise ValueError(QUANTISED)


def _freeze(model):
    """All but what `trainable` names."""
    model.requires_grad_(False)
    model.loaded_shapes = _shapes(model)
    patterns = vars(model.config).pop("trained_patterns", None)
    if patterns is not None:
        set_trainable(model, trained_names(model, patterns))


def _trainable_config(mma: dict, stored: MMAConfig | None, name) -> MMAConfig:
    if not isinstance(mma, dict):
        raise ValueError(f"`mma` must be a dict of MMAConfig's fields, {{}} for its defaults; got {mma!r}.")
    known = set(MMAConfig.__dataclass_fields__)
    if unknown := sorted(set(mma) - known):
        raise ValueError(f"`mma` has no field {', '.join(unknown)}; it knows {', '.join(sorted(known))}.")
    if stored is None:
        return MMAConfig(**mma)
    asked = MMAConfig(**{**stored.to_dict(), **mma, "peft_type": None, "peft_version": None})
    other = {key: pair for key in mma if (pair := (getattr(stored, key), getattr(asked, key)))[0] != pair[1]}
    if other:
        listed = ", ".join(f"{key}: stored {a!r}, asked {b!r}" for key, (a, b) in other.items())
        raise ValueError(
            f"{name} holds an adapter with other settings ({listed}). Pass `mma: {{}}` to continue with it."
        )
    stored.inference_mode = False
    return stored


def _stored_config(name, folder: str, hub):
    """The config of an adapter of any of PEFT's types."""
    file = find_file(name, f"{folder}/{ADAPTER_CONFIG}".lstrip("/"), hub)
    if file is None:
        raise ValueError(f"No adapter in {name}: neither {ADAPTER_NAME}/{ADAPTER_CONFIG} nor {ADAPTER_CONFIG}.")
    kind = read_json(file).get("peft_type")
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(f"{file} is of the type {kind!r}, which PEFT {peft_version} does not know: upgrade `peft`.")
    config_class = MMAConfig if kind == "MMA" else PeftConfig
    return config_class.from_pretrained(name, subfolder=folder or None, **hub)


@contextlib.contextmanager
def _explained(name):
    """What transformers says of weights that it cannot load, with the folder's name and a way out."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(DAMAGED.format(file=f"A file of base weights of {name}", cause=error)) from error
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise ValueError(
            f"The base weights of {name} have other shapes than its config.json says (see the report above): they are "
            "another model's. Name its own checkpoints there, or with `text_checkpoint` and `vision_checkpoint`."
        ) from error


def _adapter_weights(name, folder: str, hub) -> dict[str, torch.Tensor]:
    file = find_file(name, f"{folder}/{ADAPTER_WEIGHTS}".lstrip("/"), hub)
    if file is None:
        raise OSError(f"{name} has no {folder}/{ADAPTER_WEIGHTS}. (Pickled adapters are not read.)")
    return read_adapter(file)


def _base_name(key: str) -> str | None:
    """A parameter's name without the wrappers of adapters; None for what belongs to an adapter."""
    if ".adapter_" in key or ".modules_to_save." in key:
        return None
    return key.replace(".base_layer.", ".").replace(".original_module.", ".")


def _check_complete(info, name):
    missing = sorted(key for key in info["missing_keys"] if "adapter_" not in key)
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ValueError(f"The base checkpoints of {name} lack weights of the model: {shown}.")
    unexpected = sorted(info["unexpected_keys"])
    if unexpected:
        shown = ", ".join(unexpected[:5]) + (f" and {len(unexpected) - 5} more" if len(unexpected) > 5 else "")
        raise ValueError(
            f"The base weights of {name} hold more than its config.json says: {shown}. They are another model's, or "
            "config.json was changed."
        )


__all__ = ["LavinPeftModel"]
