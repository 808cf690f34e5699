"""An adapter on a LaVIN: its maps, where it goes, its tensors, and that a change of it happens whole or not at all."""

import copy
import re
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from peft.utils import ModulesToSaveWrapper
from torch import nn


MMA_PARTS = ("adapter_down", "adapter_up", "adapter_router")
BASE_KEY = "base_model.model."  # PEFT writes adapter keys as a PeftModel names them
TOWERS = ("vision_tower", "language_model")
ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention")
MLP_NAMES = ("mlp", "feed_forward", "ffn")
SWITCHES = ("_active_adapter", "_disable_adapters", "_adapters", "adapter_config", "peft_config", "training")


class MMALinear(nn.Linear):
    """A linear map whose float32 weights serve inputs of any dtype."""

    def reset_parameters(self):
        """Does nothing: [`MMALayer.reset_parameters`] draws them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class MMAUp(nn.Module):
    """
    The up maps of all experts. `weight` is `(experts, features, r / groups)`, `bias` `(experts, features)`; output
    block i of an expert reads block i of the r inputs (a grouped 1x1 convolution).
    """

    def __init__(self, features: int, r: int, groups: int, experts: int, **kwargs):
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(experts, features, r // groups, **kwargs))
        self.bias = nn.Parameter(torch.empty(experts, features, **kwargs))

    def dense(self) -> torch.Tensor:
        """Each expert's map as one matrix, the bias its last row: `(experts, r + 1, features)`."""
        experts, features, k = self.weight.shape
        blocks = self.weight.view(experts, self.groups, features // self.groups, k).transpose(2, 3)
        eye = torch.eye(self.groups, device=blocks.device, dtype=blocks.dtype)[:, None, :, None]
        rows = (blocks.unsqueeze(3) * eye).reshape(experts, -1, features)
        return torch.cat([rows, self.bias.unsqueeze(1)], dim=1)

    def forward(self, x: torch.Tensor, a: torch.Tensor, weights: torch.Tensor, scale: float) -> torch.Tensor:
        """x + scale * sum of the experts' outputs on `a`, weighted by `weights`: one product for all experts."""
        dense = (self.dense() * scale).to(x.dtype)
        a = F.pad(a, (0, 1), value=1.0)
        if weights.shape[1] == 1:  # one choice for a whole row: its experts' maps are mixed first
            return torch.baddbmm(x, a, (weights.squeeze(1) @ dense.flatten(1)).unflatten(1, dense.shape[1:]))
        mixed = (weights.unsqueeze(-1) * a.unsqueeze(-2)).flatten(-2)
        return torch.addmm(x.flatten(0, -2), mixed.flatten(0, -2), dense.flatten(0, 1)).view_as(x)


def find_lavin(model: nn.Module) -> nn.Module:
    """The [`LavinModel`] inside `model`, by what it has: classes of two imports of this code are not the same."""
    for module in model.modules():
        if "routing" in vars(module) and hasattr(module, "vision_tower"):
            return module
    raise ValueError(f"MMA needs a LaVIN model with a modality embedding, got {type(model).__name__}.")


def find_blocks(tower: nn.Module) -> tuple[str, list[nn.Module]]:
    """Name and modules of a tower's stack of blocks: its longest `ModuleList`."""
    lists = [(name, module) for name, module in tower.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        return "", []
    name, blocks = max(lists, key=lambda item: len(item[1]))
    return name, list(blocks)


def _names_in(blocks: list[nn.Module], known: tuple[str, ...]) -> list[str]:
    """
    The names under which all blocks have a module of a kind. In a hybrid, what stands in the place of the attention of
    the other blocks (linear attention, a state space, a convolution) is the one child that these do not have. Where a
    block has several in a list, each of them is meant.
    """
    children = [{name for name, _ in block.named_children()} for block in blocks]
    name = next((name for name in known if any(name in own for own in children)), None)
    if name is None:
        return []
    others = set().union(*(own for own in children if name in own))
    places = []
    for block, own in zip(blocks, children, strict=True):
        parts = {child for child in own - others if any(getattr(block, child).children())}  # norms have none
        places.append([name] if name in own else sorted(parts))
    if not all(len(place) == 1 for place in places):
        return []
    found = {(place, getattr(block, place)) for block, (place,) in zip(blocks, places, strict=True)}
    return sorted({place + r"\.\d+" * isinstance(module, nn.ModuleList) for place, module in found})


def default_target_modules(lavin: nn.Module, config) -> str:
    """
    A regex for the attention (and, on request, MLP) modules of both towers.

    Raises:
        `ValueError`: if a block has none under a known name; lists the names that there are.
    """
    patterns = []
    for tower, with_mlp in zip(TOWERS, (config.vision_mlp, config.text_mlp), strict=True):
        stack, blocks = find_blocks(getattr(lavin, tower))
        names = []
        for kind, known in (("attention", ATTENTION_NAMES), ("MLP", MLP_NAMES))[: 1 + with_mlp]:
            found = _names_in(blocks, known)
            if not found:
                candidates = sorted({name for block in blocks for name, _ in block.named_children()})
                raise ValueError(
                    f"No {kind} modules found in the {tower} ({type(getattr(lavin, tower)).__name__}). Candidates in "
                    f"`{stack or 'its modules'}`: {candidates}. Name them in `target_modules`, e.g. "
                    f"`target_modules='.*{tower}.*[.]({'|'.join(candidates[:2])})'`."
                )
            names += found
        patterns.append(rf"{tower}\.{re.escape(stack)}\.\d+\.({'|'.join(names)})")
    return rf"(.*\.)?({'|'.join(patterns)})"


def check_adapter_name(model: nn.Module, name: str):
    """
    Raises:
        `ValueError`: if an adapter cannot be saved under this name.
    """
    if not re.fullmatch(r"\w[\w-]*", name, re.ASCII):
        raise ValueError(
            f"{name!r} cannot name an adapter, which is saved in a folder of its name: use letters, digits, `_` and "
            "`-` only."
        )
    own = (
        key.split(".") for key, _ in model.named_modules() if ".adapter_" not in key and ".modules_to_save." not in key
    )
    if hasattr(nn.ModuleDict(), name) or any(name in parts for parts in own):
        raise ValueError(f"{name!r} cannot name an adapter, as something in the model has that name: choose another.")


@contextmanager
def all_or_nothing(model: nn.Module):
    """Where an adapter is added or switched: after an error the model computes what it did before."""
    modules = [
        (module, dict(module._modules), {key: copy.copy(vars(module)[key]) for key in SWITCHES if key in vars(module)})
        for module in model.modules()
    ]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    routing = find_lavin(model).routing
    layers, loaded = list(routing.layers), getattr(model, "_hf_peft_config_loaded", False)
    try:
        yield
    except BaseException:
        for module, children, switches in modules:
            module._modules.clear()
            module._modules.update(children)
            for key in SWITCHES:
                vars(module).pop(key, None)
            vars(module).update(switches)
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)
        routing.layers, model._hf_peft_config_loaded = layers, loaded
        routing.forget()
        raise


def bring_in(model: nn.Module, names: list[str]):
    """
    Gives the modules of these names weights of their own, where they compute, in place of weights that accelerate
    brings for each forward (`device_map` with "disk", or "cpu" beside a GPU): what is trained cannot be brought from
    where it was before.
    """
    for key, module in model.named_modules():
        if not key.endswith(tuple(names)) or not any(parameter.is_meta for parameter in module.parameters()):
            continue
        for part in module.modules():
            hook = getattr(part, "_hf_hook", None)
            for one in getattr(hook, "hooks", [hook]):
                if getattr(one, "offload", False):
                    _hold(part, one)


def _hold(module: nn.Module, hook):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

    remove_hook_from_module(module)
    for name, parameter in list(module.named_parameters(recurse=hook.place_submodules)):
        if parameter.is_meta:
            parent, _, last = name.rpartition(".")
            value = torch.as_tensor(hook.weights_map[name]).to(hook.execution_device, copy=True)
            setattr(module.get_submodule(parent), last, nn.Parameter(value, requires_grad=parameter.requires_grad))
    add_hook_to_module(module, AlignDevicesHook(hook.execution_device, io_same_device=hook.io_same_device))


def is_mma(adapter) -> bool:
    return adapter.peft_type.value == "MMA"


def check_no_mma(model, adapter):
    """
    Raises:
        `ValueError`: if an adapter of another type would come beside an MMA adapter: only one of them would act, and
            what is trained with MMA would go with neither.
    """
    names = [name for name, own in getattr(model, "peft_config", {}).items() if is_mma(own)]
    if names and hasattr(adapter, "peft_type") and getattr(adapter.peft_type, "value", adapter.peft_type) != "MMA":
        raise ValueError(
            f"This model has an MMA adapter ({', '.join(names)}), beside which no {adapter.__class__.__name__} can be "
            f"added: delete it first (`delete_adapter({names[0]!r})`), or load the base without it."
        )


def unwrap_adapters(model):
    """Takes the wrappers of deleted adapters out of the model."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, ModulesToSaveWrapper):
                setattr(module, name, child.original_module)
            elif hasattr(child, "adapter_down"):
                setattr(module, name, child.base_layer)
        if "routing" in vars(module):
            module.routing.layers.clear()


def check_not_diverged(weights: dict[str, torch.Tensor]):
    """
    Raises:
        `ValueError`: if an adapter's weights, which are about to be set, hold NaN or infinity.
    """
    bad = next((key for key, value in weights.items() if not value.is_meta and not value.isfinite().all()), None)
    if bad is not None:
        raise ValueError(
            f"The adapter holds NaN or infinity ({bad.removeprefix('base_model.model.')}): its training has diverged. "
            "Take an earlier `checkpoint-N`."
        )


def adapter_tensors(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """
    All that an adapter consists of, by the names it is saved under: [`~peft.get_peft_model_state_dict`] in one walk,
    without a look at the base's weights.
    """
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            parts = {name: module.modules_to_save}
        elif "adapter_down" in module._modules:
            parts = {f"{name}.{part}": getattr(module, part) for part in MMA_PARTS}
        else:
            continue
        for part, adapters in parts.items():
            if adapter_name in adapters:
                found.update(adapters[adapter_name].state_dict(prefix=f"{part}."))
    return found


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


def base_name(key: str) -> str | None:
    """A parameter's name without the wrappers of adapters; None for what belongs to an adapter."""
    if ".adapter_" in key or ".modules_to_save." in key:
        return None
    return key.replace(".base_layer.", ".").replace(".original_module.", ".")


def lift_to_float32(model: nn.Module, adapter_name: str):
    """PEFT lifts tuner layers to float32 but not `modules_to_save`, which in bf16 would hardly move."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            for parameter in module.modules_to_save[adapter_name].parameters():
                # ZeRO-3 keeps the dtype of all its partitions alike.
                if parameter.dtype in (torch.float16, torch.bfloat16) and not hasattr(parameter, "ds_id"):
                    parameter.data = parameter.data.float()
            # Without autocast a map, an embedding or a norm must fit what stands before and behind it.
            weight = getattr(module.original_module, "weight", None)
            if weight is not None and weight.is_floating_point() and _to_own not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_to_own)
                module.register_forward_hook(_to_base)


def _to_own(wrapper: ModulesToSaveWrapper, args: tuple) -> tuple | None:
    """Half-precision input in the dtype of the weights that read it: the trained ones, or the base's own."""
    x = args[0]
    if not x.is_floating_point() or torch.is_autocast_enabled(x.device.type):
        return None
    return x.to(wrapper.weight.dtype), *args[1:]


def _to_base(wrapper: ModulesToSaveWrapper, args: tuple, output: torch.Tensor) -> torch.Tensor:
    if torch.is_autocast_enabled(output.device.type):
        return output
    return output.to(wrapper.original_module.weight.dtype)
