"""Adapters on a LaVIN: a trainable one as a [`PeftModel`], loading and switching, and PEFT's own types beside MMA."""

import copy
import re
from pathlib import Path

import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft import __version__ as peft_version
from peft.functional import delete_adapter
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from safetensors.torch import save_file

from .adapters_lavin import (
    adapter_tensors,
    all_or_nothing,
    bring_in,
    check_no_mma,
    is_mma,
    set_adapter_weights,
    unwrap_adapters,
)
from .files_lavin import (
    ADAPTER_CONFIG,
    ADAPTER_NAME,
    ADAPTER_WEIGHTS,
    HUB_ARGUMENTS,
    find_file,
    read_adapter,
    read_json,
)
from .saving_lavin import can_be_light
from .tuner_lavin import MMAConfig


MARK = {"format": "pt", "adapter": f"in {ADAPTER_NAME}/; this file has no tensors"}
PEFT_SAVES = ("push_to_hub", "repo_id", "token", "private", "variant")
PROJECTOR = "multi_modal_projector"
ADAPTER = "default"
# PEFT knows adaption prompts by the model's type, and fits them into the topmost attention modules, which are the
# decoder's. Theirs are computed as LLaMA's.
PROMPTED = ("llama", "mistral")
TRANSFORMERS_MODEL_CONFIG.setdefault("lavin", TRANSFORMERS_MODEL_CONFIG["llama"])


class LavinAdapterMixin:
    """
    transformers' [`~integrations.PeftAdapterMixin`], with `modules_to_save` switched as the layers are, no training of
    an adapter that was loaded for inference, and nothing left behind by the last one.
    """

    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        self._check_adapters()
        return next(layer.active_adapters for layer in self._adapted() if isinstance(layer, BaseTunerLayer))

    def add_adapter(self, adapter_config: PeftConfig, adapter_name: str | None = None):
        """Adds a new adapter, named "default" by default, and makes it the active one. No other type beside MMA."""
        adapter_name = adapter_name or "default"
        if not isinstance(adapter_config, PeftConfig):
            raise TypeError(f"`adapter_config` must be a PeftConfig, got {type(adapter_config).__name__}.")
        if adapter_name in getattr(self, "peft_config", {}):
            raise ValueError(f"Adapter with name {adapter_name} already exists. Please use a different name.")
        check_no_mma(self, adapter_config)
        adapter_config.base_model_name_or_path = self.name_or_path
        with all_or_nothing(self):
            inject_adapter_in_model(adapter_config, self, adapter_name)
            self._hf_peft_config_loaded = True
            self.set_adapter(adapter_name)

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
            peft_config = stored_config(peft_model_id, folder, hub)
            if not is_mma(peft_config):
                check_no_mma(self, peft_config)
                with all_or_nothing(self):
                    return super().load_adapter(
                        peft_model_id, adapter_name, is_trainable=is_trainable, adapter_kwargs=adapter_kwargs, **kwargs
                    )
            adapter_state_dict = adapter_weights(peft_model_id, folder, hub)
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

    def set_adapter(self, adapter_name: str | list[str]):
        """Makes an adapter the active one. One that was loaded for inference stays frozen."""
        self._check_adapters(adapter_name)
        with all_or_nothing(self):
            for module in self._adapted():
                module.set_adapter(adapter_name)
        self._freeze_inference_adapters()

    def enable_adapters(self):
        """Undoes [`disable_adapters`]."""
        self._check_adapters()
        for module in self._adapted():
            module.enable_adapters(True)
        self._freeze_inference_adapters()

    def disable_adapters(self):
        """From here on the model is its base."""
        self._check_adapters()
        for module in self._adapted():
            module.enable_adapters(False)

    def delete_adapter(self, adapter_names: str | list[str]):
        """Deletes adapters. After the last one the model is as it was before the first."""
        self._check_adapters(adapter_names)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            prefix = PEFT_TYPE_TO_PREFIX_MAPPING[self.peft_config[name].peft_type]
            delete_adapter(self, adapter_name=name, prefix=prefix)
            del self.peft_config[name]
        if not self.peft_config:
            del self.peft_config
            self._hf_peft_config_loaded = False
            unwrap_adapters(self)

    def get_adapter_state_dict(self, adapter_name: str | None = None, state_dict: dict | None = None) -> dict:
        """The weights of an adapter, by default of the active one."""
        self._check_adapters(adapter_name or ())
        adapter_name = adapter_name or self.active_adapters()[0]
        return get_peft_model_state_dict(self, state_dict=state_dict, adapter_name=adapter_name)

    def _adapted(self) -> list:
        return [module for module in self.modules() if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper)]

    def _check_adapters(self, names: str | list[str] = ()):
        """
        Raises:
            `ValueError`: if there is no adapter, or none of that name.
        """
        if not self._hf_peft_config_loaded:
            raise ValueError("No adapter loaded. Please load an adapter first.")
        unknown = [name for name in ([names] if isinstance(names, str) else names) if name not in self.peft_config]
        if unknown:
            raise ValueError(f"No adapter is named {', '.join(unknown)}; there are {', '.join(self.peft_config)}.")

    def _freeze_inference_adapters(self):
        for adapter, config in self.peft_config.items():
            if config.inference_mode:
                for name, parameter in self.named_parameters():
                    if f".{adapter}." in name:
                        parameter.requires_grad_(False)


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
        config, weights = stored_config(model_id, folder, hub), adapter_weights(model_id, folder, hub)
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
        full = False if full is None and can_be_light(self.get_base_model()) else full
        kwargs = {key: value for key, value in kwargs.items() if key in PEFT_SAVES}
        self.get_base_model().save_pretrained(
            save_directory, full=full, is_main_process=is_main_process, state_dict=state_dict, **kwargs
        )
        if is_main_process and re.fullmatch(r"checkpoint-\d+", Path(save_directory).name):
            # Where there is a file of this name, Trainer has `load_adapter` load the best checkpoint at the end.
            save_file({}, Path(save_directory, ADAPTER_WEIGHTS), metadata=MARK)

    def push_to_hub(self, repo_id: str, **kwargs):
        kwargs.setdefault("full", False if can_be_light(self.get_base_model()) else None)
        return self.get_base_model().push_to_hub(repo_id, **kwargs)


def _is_marked(folder) -> bool:
    file = Path(folder, ADAPTER_WEIGHTS)
    if not file.is_file():
        return False
    with safe_open(file, framework="pt") as opened:
        return opened.metadata() == MARK


def stored_config(name, folder: str, hub):
    """The config of an adapter of any of PEFT's types."""
    file = find_file(name, f"{folder}/{ADAPTER_CONFIG}".lstrip("/"), hub)
    if file is None:
        raise ValueError(f"No adapter in {name}: neither {ADAPTER_NAME}/{ADAPTER_CONFIG} nor {ADAPTER_CONFIG}.")
    kind = read_json(file).get("peft_type")
    if kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(f"{file} is of the type {kind!r}, which PEFT {peft_version} does not know: upgrade `peft`.")
    config_class = MMAConfig if kind == "MMA" else PeftConfig
    return config_class.from_pretrained(name, subfolder=folder or None, **hub)


def adapter_weights(name, folder: str, hub) -> dict[str, torch.Tensor]:
    file = find_file(name, f"{folder}/{ADAPTER_WEIGHTS}".lstrip("/"), hub)
    if file is None:
        raise OSError(f"{name} has no {folder}/{ADAPTER_WEIGHTS}. (Pickled adapters are not read.)")
    return read_adapter(file)


def training_config(mma: dict, stored: MMAConfig | None, name) -> MMAConfig:
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


def with_adapter(model, peft: dict) -> PeftModel:
    """
    Puts an adapter of one of PEFT's own types on a frozen LaVIN. The projector is trained and saved with it, whole.

    What PEFT's `save_pretrained` then writes is an adapter folder of PEFT's own. `from_pretrained(base, peft=...)` and
    [`~peft.set_peft_model_state_dict`] read it again; PEFT's own loading would leave out an adaption prompt's
    projector.

    Args:
        model ([`LavinForConditionalGeneration`]): The model, changed in place.
        peft (`dict`): `peft_type` (`"LORA"`, `"IA3"`, `"ADAPTION_PROMPT"` ...), fields of that type's config,
            and `init_seed` (0 by default) for its random start.

    Raises:
        `ValueError`: if PEFT does not know the type or a field, or the decoder has no place for it.
    """
    if not isinstance(peft, dict) or str(peft.get("peft_type")) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        known = ", ".join(sorted(str(kind.value) for kind in PEFT_TYPE_TO_CONFIG_MAPPING))
        raise ValueError(f"`peft` must be a dict with `peft_type`, one of {known}; got {peft!r}.")
    fields = {key: value for key, value in peft.items() if key not in ("peft_type", "init_seed")}
    seed = peft.get("init_seed", 0)
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[peft["peft_type"]]
    if config_class.__name__ == "MMAConfig":
        raise ValueError("MMA is LaVIN's own adapter: pass its fields as `mma`.")
    if unknown := sorted(set(fields) - set(config_class.__dataclass_fields__)):
        raise ValueError(f"PEFT's {config_class.__name__} has no field {', '.join(unknown)}.")
    saves_modules = "modules_to_save" in config_class.__dataclass_fields__
    if saves_modules:
        fields["modules_to_save"] = sorted({*(fields.get("modules_to_save") or ()), PROJECTOR})
    config = config_class(**fields)
    if config.is_prompt_learning:
        raise ValueError(f"{config_class.__name__} puts tokens of its own before a row, which a LaVIN cannot take.")
    if config.is_adaption_prompt:
        text = model.config.text_config
        if text.model_type not in PROMPTED:
            raise ValueError(f"PEFT's adaption prompts fit a {' or a '.join(PROMPTED)}, not a {text.model_type}.")
        if not 1 <= (config.adapter_layers or 0) <= text.num_hidden_layers:  # beyond lie those of the vision tower
            raise ValueError(f"`adapter_layers` must be 1 to {text.num_hidden_layers}, got {config.adapter_layers}.")
    bring_in(model, [*(fields.get("modules_to_save") or ()), PROJECTOR])
    with torch.random.fork_rng(devices=[]):  # PEFT draws from the common generator: runs and ranks would differ
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config, adapter_name=ADAPTER)
    if away := next((name for name, p in adapted.named_parameters() if p.requires_grad and p.is_meta), None):
        raise ValueError(f"PEFT cannot train {away}, beside a weight that is offloaded: load without `device_map`.")
    if not saves_modules:
        wrapper = ModulesToSaveWrapper(model.model.multi_modal_projector, ADAPTER)
        wrapper.set_adapter(ADAPTER)
        model.model.multi_modal_projector = wrapper
    return adapted
