"""The PEFT type `MMA`: Mixture-of-Modality Adapters (LaVIN, arXiv 2305.15023, sections 3.1 and 3.2)."""

import math
import os
import re
import warnings
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field

import peft.utils
import torch
import torch.nn.functional as F
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, PeftType
from torch import nn

from .adapters_lavin import (
    MMA_PARTS,
    TOWERS,
    MMALinear,
    MMAUp,
    all_or_nothing,
    bring_in,
    check_adapter_name,
    check_not_diverged,
    default_target_modules,
    find_lavin,
    lift_to_float32,
)
from .routing_lavin import MMARouting, computing_device


TRAINED_MODULES = ("multi_modal_projector", "modality_embedding")
NO_SINGLE_MERGE = (
    "One merge cannot serve both modalities: MMA's expert weights differ between text-only and image input, so each "
    "modality has merged weights of its own. Call `merge_modality('text')` or `merge_modality('image')` for a plain "
    "language model, or `unload()` for the base without the adapter."
)


def _add_peft_type():
    """Adds `MMA` to PEFT's closed enum. This file is imported twice in real life (installed, and as remote code)."""
    if "MMA" not in PeftType.__members__:
        member = str.__new__(PeftType, "MMA")
        member._name_, member._value_ = "MMA", "MMA"
        type.__setattr__(PeftType, "MMA", member)
        PeftType._member_map_["MMA"] = PeftType._value2member_map_["MMA"] = member
        PeftType._member_names_.append("MMA")


_add_peft_type()


@dataclass
class MMAConfig(PeftConfig):
    """
    Configuration of an [`MMAModel`]. Every field has a `help` text in its metadata; the defaults are LaVIN-7B's.

    Raises:
        `ValueError`: if a field is out of range.
    """

    r: int = field(default=8, metadata={"help": "Rank of the adapter: the width between its two maps."})
    groups: int = field(
        default=2, metadata={"help": "Blocks of the block-diagonal up maps. Must divide `r` and both towers' widths."}
    )
    scale: float = field(default=1.0, metadata={"help": "Factor on the adapter's output (LaVIN's s)."})
    router_temperature: float = field(
        default=10.0, metadata={"help": "Temperature of the router's softmax (LaVIN: 10 for 7B, 5 for 13B)."}
    )
    dropout: float = field(default=0.1, metadata={"help": "Dropout between the two maps, in training only."})
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Modules whose input is adapted: names, or a regex on the full name. By default the attention "
            "modules of both towers (and the MLPs where the two flags below say so)."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Modules left out although `target_modules` matches them: names or a regex."}
    )
    text_mlp: bool = field(
        default=False, metadata={"help": "Adapt the language model's MLP inputs as well (the reference's `block`)."}
    )
    vision_mlp: bool = field(
        default=False, metadata={"help": "Adapt the vision tower's MLP inputs as well (its `router_block`)."}
    )
    vision_router: bool = field(
        default=True,
        metadata={"help": "Mix two experts per image token. Off: one expert, without a router, in the vision tower."},
    )
    init_seed: int = field(
        default=0, metadata={"help": "Seed of the initial weights, independent of torch's global generator."}
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "Start as the identity. False, as in PEFT's other types: all maps are random, for tests."},
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules trained and saved whole. The projector and the modality embedding always are."},
    )

    @classmethod
    def check_kwargs(cls, **kwargs):
        """PEFT leaves out what it does not know, with a warning: the adapter would compute something else."""
        newer = {
            key: value
            for key, value in kwargs.items()
            if key not in cls.__dataclass_fields__ and value not in (None, False, [], {})
        }
        if newer:
            said = ", ".join(f"{key}={value!r}" for key, value in sorted(newer.items()))
            raise ValueError(
                f"This adapter has settings that this version of LaVIN does not know ({said}): a newer one saved "
                "it. Upgrade `lavin` and `peft`, or load the folder with its own code (`trust_remote_code=True` where "
                "`lavin` is not installed)."
            )
        return kwargs

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.MMA
        self.modules_to_save = list(dict.fromkeys([*TRAINED_MODULES, *(self.modules_to_save or [])]))
        if isinstance(self.target_modules, set | tuple):
            self.target_modules = sorted(self.target_modules)
        for name, kind in {
            "r": int,
            "groups": int,
            "scale": float,
            "router_temperature": float,
            "dropout": float,
        }.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, kind)):
                raise ValueError(f"`{name}` must be a number of type {kind.__name__}, got {value!r}.")
        checks = {
            "r": (self.r >= 1, "at least 1"),
            "groups": (self.groups >= 1 and self.r % self.groups == 0, f"a divisor of r={self.r}"),
            "router_temperature": (self.router_temperature > 0, "greater than 0"),
            "dropout": (0 <= self.dropout < 1, "in [0, 1)"),
        }
        for name, (good, allowed) in checks.items():
            if not good:
                raise ValueError(f"`{name}` must be {allowed}, got {getattr(self, name)}.")

    def to_dict(self):
        # What is written must mean the same on every machine: no local path, no hash of a remote-code module.
        values = super().to_dict()
        name = values.get("base_model_name_or_path")
        if name is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
            values["base_model_name_or_path"] = None
        if "transformers_modules" in str(values.get("auto_mapping")):
            values["auto_mapping"] = None
        if values["init_weights"]:  # a LaVIN from before this field refuses what it does not know, unless it is false
            del values["init_weights"]
        return values

    def save_pretrained(self, save_directory, **kwargs):
        if not os.path.isfile(os.path.join(save_directory, os.pardir, "config.json")):
            warnings.warn(
                "This saves the adapter alone, for `PeftModel.from_pretrained(base, folder)`. For a repository that "
                "`AutoModel.from_pretrained` loads, call `model.get_base_model().save_pretrained(folder)`.",
                stacklevel=2,
            )
        kwargs["auto_mapping_dict"] = None
        super().save_pretrained(save_directory, **kwargs)


def check_one_adapter(adapter_names: str | list[str]):
    if not isinstance(adapter_names, str) and len(adapter_names) > 1:
        raise ValueError(f"MMA applies one adapter at a time, got {list(adapter_names)}: set one of them.")


class MMALayer(nn.Module, BaseTunerLayer):
    """
    Wraps an attention (or MLP) module and adapts its input, `(batch, length, features)`:

        x' = x + s (w0 (B a + b0) + w1 (D a + d0)),   a = dropout(A x + a0)

    In the language model w comes from the routing table, in the vision tower from each token's own features.
    """

    adapter_layer_names = MMA_PARTS
    other_param_names = ("adapter_dropout", "adapter_config")

    def __init__(self, base_layer: nn.Module, features: int, routing: MMARouting, is_text: bool, key: str):
        super().__init__()
        self.base_layer = base_layer
        self.features = features
        self.routing = routing
        self.is_text = is_text
        self.key = key  # its name in the LavinModel, and its place in the routing table
        self.adapter_down, self.adapter_up, self.adapter_router = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.adapter_dropout, self.adapter_config = nn.ModuleDict(), {}
        self._disable_adapters = False
        self._active_adapter = []
        self.merged_adapters = []

    @property
    def active_name(self) -> str | None:
        return self.active_adapters[0] if self.active_adapters else None

    @property
    def active(self) -> bool:
        return not self._disable_adapters and self.active_name in self.adapter_down

    def update_layer(self, adapter_name: str, config: MMAConfig, empty: bool = False):
        """Adds an adapter, initialised from its own generator: every layout and ZeRO stage starts equal.

        With `empty` it stays on the meta device, for weights that are about to be loaded (`low_cpu_mem_usage`).
        """
        self.routing.check_not_folded()
        self.routing.forget()
        if self.features % config.groups:
            raise ValueError(f"`groups`={config.groups} does not divide the width {self.features} of {self.key}.")
        routed = self.is_text or config.vision_router
        self.adapter_config[adapter_name] = config
        device = torch.device("meta") if empty else computing_device(self.base_layer)
        made = {"device": device, "dtype": torch.float32}
        self.adapter_dropout[adapter_name] = nn.Dropout(config.dropout)
        self.adapter_down[adapter_name] = MMALinear(self.features, config.r, **made)
        self.adapter_up[adapter_name] = MMAUp(self.features, config.r, config.groups, 2 if routed else 1, **made)
        if routed:
            self.adapter_router[adapter_name] = MMALinear(self.features, 2, **made)
        if device.type != "meta":
            self.reset_parameters(adapter_name, config.init_seed, config.init_weights)

    @torch.no_grad()
    def reset_parameters(self, adapter_name: str, seed: int, as_identity: bool = True):
        """A is Xavier-uniform, the router as torch's Linear, all else zero (the identity), or as torch's own maps."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {self.key}".encode()))

        def draw(parameter, bound):
            parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))

        down, up = self.adapter_down[adapter_name], self.adapter_up[adapter_name]
        draw(down.weight, math.sqrt(6 / (down.in_features + down.out_features)))
        for parameter in (down.bias, up.weight, up.bias):
            parameter.zero_()
        if adapter_name in self.adapter_router:
            for parameter in self.adapter_router[adapter_name].parameters():
                draw(parameter, 1 / math.sqrt(self.features))
        if not as_identity:
            draw(down.bias, 1 / math.sqrt(self.features))
            for parameter in (up.weight, up.bias):
                draw(parameter, 1 / math.sqrt(up.weight.shape[-1]))

    def enable_adapters(self, enabled: bool):
        self.routing.check_not_folded()
        self.routing.forget()
        super().enable_adapters(enabled)

    def set_adapter(self, adapter_names, inference_mode: bool = False):
        self.routing.check_not_folded()
        self.routing.forget()
        check_one_adapter(adapter_names)
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def merge(self, *args, **kwargs):
        raise ValueError(NO_SINGLE_MERGE)

    def forward(self, *args, **kwargs):
        if self.active:
            if args:
                args = (self.adapt(args[0]), *args[1:])
            else:
                kwargs["hidden_states"] = self.adapt(kwargs["hidden_states"])
        return self.base_layer(*args, **kwargs)

    def adapt(self, x: torch.Tensor) -> torch.Tensor:
        """The adapted input, in x's dtype and shape."""
        name = self.active_name
        kept = self.routing.usable() if self.is_text and self.routing.weights is not None else None
        # ZeRO-3 gathers a partitioned weight only inside its own module.
        if kept is not None and not self.training and not hasattr(self.adapter_down[name].weight, "ds_id"):
            return self.adapt_kept(x, kept.maps.setdefault(self.key, {}))
        a = self.adapter_dropout[name](self.adapter_down[name](x))
        return self.adapter_up[name](x, a, self.expert_weights(x).to(x), self.adapter_config[name].scale)

    def adapt_kept(self, x: torch.Tensor, kept: dict) -> torch.Tensor:
        """Where gradients are off: two products and a weighting, as every small operation counts in decoding."""
        if x.dtype not in kept:
            kept[x.dtype] = self.kept_maps(x.dtype)
        down, bias, up = kept[x.dtype]
        weights = self.routing.weights[self.key].to(x)
        a = F.linear(x, down, bias).view(*x.shape[:-1], weights.shape[1], -1)
        mixed = (a * weights[:, None, :, None]).view(-1, up.shape[0])
        return torch.addmm(x.reshape(-1, x.shape[-1]), mixed, up).view_as(x)

    def kept_maps(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The down map once for each expert, with an output that is always 1 for the up bias; and all up maps."""
        name = self.active_name
        down, up = self.adapter_down[name], self.adapter_up[name].dense() * self.adapter_config[name].scale
        weight = F.pad(down.weight, (0, 0, 0, 1)).repeat(up.shape[0], 1)
        bias = F.pad(down.bias, (0, 1), value=1.0).repeat(up.shape[0])
        return weight.to(dtype), bias.to(dtype), up.flatten(0, 1).to(dtype)

    def expert_weights(self, x: torch.Tensor) -> torch.Tensor:
        """Weights of the experts, `(batch, length or 1, experts)`."""
        name, routing = self.active_name, self.routing
        if name not in self.adapter_router:
            return x.new_ones(x.shape[0], 1, 1)
        if self.is_text and routing.collected is None:
            if routing.weights is None:
                raise RuntimeError("MMA routes by modality: call the LavinModel, not its language model.")
            return routing.weights[self.key].unsqueeze(1)
        logits = self.adapter_router[name](x).float()
        weights = torch.softmax(logits / self.adapter_config[name].router_temperature, dim=-1)
        if self.is_text:
            routing.collected[self.key] = weights[:, 0]
        return weights


class MMAModel(BaseTuner):
    """
    Puts Mixture-of-Modality Adapters in front of the attention of both towers of a LaVIN model.

    Example:

    ```python
    >>> from peft import get_peft_model
    >>> from lavin import MMAConfig
    >>> model = get_peft_model(model, MMAConfig(), adapter_name="mma")  # doctest: +SKIP
    ```
    """

    prefix = "adapter_"
    tuner_layer_cls = MMALayer
    target_module_mapping = {}

    def _prepare_adapter_config(self, peft_config: MMAConfig, model_config: dict) -> MMAConfig:
        lavin = find_lavin(self.model)
        if peft_config.target_modules is None:
            peft_config.target_modules = default_target_modules(lavin, peft_config)
        return peft_config

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key, **kwargs):
        if isinstance(target, MMALayer):
            target.update_layer(adapter_name, peft_config, self.empty)
            return
        lavin = find_lavin(self.model)
        match = re.search(rf"(?:^|\.)(({'|'.join(TOWERS)})\..*)", current_key)
        if match is None:
            raise ValueError(f"MMA adapts modules of the two towers {TOWERS}, not `{current_key}`.")
        key, tower = match.groups()
        is_text = tower == "language_model"
        hidden_size = (lavin.config.text_config if is_text else lavin.config.vision_config).hidden_size
        layer = MMALayer(target, getattr(target, "in_features", hidden_size), lavin.routing, is_text, key)
        if is_text:
            lavin.routing.add(layer)
        layer.train(target.training)
        layer._disable_adapters = any(other.disable_adapters for other in lavin.routing.layers)
        layer.update_layer(adapter_name, peft_config, self.empty)
        setattr(parent, target_name, layer)

    def _replace_module(self, parent, child_name, new_module, child):
        setattr(parent, child_name, new_module)  # PEFT's own copies `weight`, which an attention does not have

    def inject_adapter(self, model, adapter_name, *args, **kwargs):
        find_lavin(model).routing.check_not_folded()
        self.empty = kwargs.get("low_cpu_mem_usage", False)
        try:
            check_adapter_name(model, adapter_name)
            bring_in(model, self.peft_config[adapter_name].modules_to_save)
            with all_or_nothing(model):
                super().inject_adapter(model, adapter_name, *args, **kwargs)
                lift_to_float32(model, adapter_name)
        except BaseException:
            for holder in (self, model):
                vars(holder).get("peft_config", {}).pop(adapter_name, None)
            raise

    def _mark_only_adapters_as_trainable(self, model):
        own = [module for module in model.modules() if isinstance(module, MMALayer | ModulesToSaveWrapper)]
        parts = [getattr(module, name) for module in own for name in module.adapter_layer_names]
        trained = {id(parameter) for part in parts for parameter in part.parameters()}
        for parameter in model.parameters():
            if id(parameter) not in trained:
                parameter.requires_grad = False

    def _enable_adapter_layers(self, enabled: bool = True):
        find_lavin(self.model).routing.check_not_folded()
        super()._enable_adapter_layers(enabled)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False):
        find_lavin(self.model).routing.check_not_folded()
        check_one_adapter(adapter_name)
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    @classmethod
    def _get_adapter_state_dict(cls, model, **kwargs):  # what saving reads
        find_lavin(model).routing.check_not_folded()
        return super()._get_adapter_state_dict(model=model, **kwargs)

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, state_dict, **kwargs):  # what PEFT's own loading sets
        check_not_diverged(state_dict)
        return super()._remap_adapter_state_dict_for_load(state_dict=state_dict, **kwargs)

    def delete_adapter(self, adapter_name: str):
        find_lavin(self.model).routing.check_not_folded()
        was_active = adapter_name in self.active_adapters
        super().delete_adapter(adapter_name)
        if was_active and self.peft_config:
            # Layers that only the deleted adapter had would not follow the others to the next one.
            name, config = next(iter(self.peft_config.items()))
            self.set_adapter(name, inference_mode=config.inference_mode)

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs):
        if merge:
            raise ValueError(NO_SINGLE_MERGE)
        lavin = find_lavin(self.model)
        for parent in list(self.model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, ModulesToSaveWrapper):  # PEFT would leave the trained copy in the base
                    setattr(parent, name, child.original_module)
        model = super()._unload_and_optionally_merge(merge=False, **kwargs)
        lavin.routing.layers.clear()
        return model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "MMA does not mix adapters in one batch (`adapter_names`): the routing table belongs to one adapter. "
                "Call `set_adapter(name)` and run the rows of each adapter together."
            )
        yield

    def add_weighted_adapter(self, *args, **kwargs):
        raise ValueError(
            "MMA adapters cannot be mixed by weights: each routes by its own router, and maps one after the other are "
            "not linear in them. Set one of them with `set_adapter(name)`, or train one on the data of both."
        )

    def merge_modality(self, modality: str) -> nn.Module:
        """See `LavinForConditionalGeneration.merge_modality`."""
        return self.model.merge_modality(modality)


if PeftType.MMA not in PEFT_TYPE_TO_CONFIG_MAPPING:
    peft.utils.register_peft_method(name="mma", prefix="adapter_", config_cls=MMAConfig, model_cls=MMAModel)


__all__ = ["MMAConfig", "MMAModel", "MMALayer"]
