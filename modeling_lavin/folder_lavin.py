"""
What a LaVIN folder holds, and how it is loaded.

The root of every folder has config, code, processor and card. A full folder has the base weights as well; a light one
names the checkpoints they come from. The adapter lies in `mma/`, because it is the PEFT adapter named `mma`: at the
root, the Hub's Auto classes would take the whole repository for an adapter of something else.
"""

import contextlib
import copy
import os
import re

import torch
from safetensors import SafetensorError
from transformers import GenerationConfig

from .adapters_lavin import set_adapter_weights
from .configuration_lavin import CHECKPOINTS, OWN_FIELDS, LavinConfig
from .files_lavin import (
    ADAPTER_CONFIG,
    ADAPTER_NAME,
    BASE_WEIGHTS,
    DAMAGED,
    HUB_ARGUMENTS,
    NO_VARIANT,
    check_versions,
    find_file,
    installed,
    read_json,
)
from .fit_lavin import check_text
from .peft_lavin import (
    LavinAdapterMixin,
    LavinPeftModel,
    adapter_weights,
    stored_config,
    training_config,
    with_adapter,
)
from .saving_lavin import LavinSavingMixin, shapes_of
from .towers_lavin import named_base, read_towers, shards_of
from .trainable_lavin import (
    BOTH,
    EXISTING_ADAPTER,
    QUANTISED,
    check_patterns,
    set_trainable,
    trained_names,
)


class LavinFolderMixin(LavinSavingMixin, LavinAdapterMixin):
    """Loading of a LaVIN model; see the module's text for the layout."""

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
            stored = stored_config(name, ADAPTER_NAME, hub) if has_adapter else None
            model = LavinPeftModel(model, training_config(mma, stored, name), adapter_name=ADAPTER_NAME)
            if has_adapter:
                set_adapter_weights(model, adapter_weights(name, ADAPTER_NAME, hub), ADAPTER_NAME)
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
        pair = installed("pair")
        config, generation_config = pair.config_of_pair(
            vision, text, vision_revision, text_revision, hub=hub, **overrides
        )
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
        return LavinPeftModel(model, training_config(mma, None, text), adapter_name=ADAPTER_NAME)

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict:
        """What is trained is read in float32 from the start: not a bit of it is lost on the way."""
        plan, patterns = super()._get_dtype_plan(dtype), getattr(self.config, "trained_patterns", None)
        if patterns is not None:
            plan.update((f"^{re.escape(name)}$", torch.float32) for name in trained_names(self, patterns))
        return plan


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
    model.loaded_shapes = shapes_of(model)
    patterns = vars(model.config).pop("trained_patterns", None)
    if patterns is not None:
        set_trainable(model, trained_names(model, patterns))


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
