"""Folds an MMA adapter into the plain language model of one modality (method.md's identity; arXiv 2305.15023)."""

import contextlib
import copy

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.utils._pytree import tree_map
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .readers_lavin import find_readers, probe_embeds


MODALITIES = {"text": 0, "image": 1}


def _check_foldable(model) -> list:
    """
    The language model's adapted modules.

    Raises:
        `ValueError`: if the base's weights cannot be folded, or no adapter is active.
    """
    model.model.routing.check_not_folded()
    if getattr(model, "is_quantized", False) or getattr(model, "is_loaded_in_4bit", False):
        raise ValueError("A quantised base cannot be folded: load it without `quantization_config`.")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("A base whose weights are offloaded cannot be folded: load it without `device_map`.")
    layers = model.model.routing.active_layers()
    if not layers:
        raise ValueError("No MMA adapter is active in the language model: there is nothing to fold.")
    return layers


@torch.no_grad()
def fold_modality(model, modality: str):
    """See `LavinForConditionalGeneration.merge_modality`."""
    if modality not in MODALITIES:
        raise ValueError(f"`modality` must be 'text' or 'image', got {modality!r}.")
    layers = _check_foldable(model)
    if any(
        isinstance(m, BaseTunerLayer) and not hasattr(m, "adapter_down") for m in model.model.language_model.modules()
    ):
        raise ValueError("A module of the language model has another adapter. Delete that one, or merge it first.")
    readers, table = _checked_readers(model, layers)  # before anything is computed
    places = {layer.key: [_plain_name(layer, name) for name in readers[layer.key]] for layer in layers}

    config = _with_biases(model, sum(places.values(), []))
    if any(isinstance(module, ModulesToSaveWrapper) for module in (model.lm_head, model.get_input_embeddings())):
        config.tie_word_embeddings = False  # one of the two was trained
    dtype = model.get_input_embeddings().weight.dtype
    with torch.device(model.device):
        plain = AutoModelForCausalLM.from_config(config, dtype=dtype)
    decoder = _decoder(plain, model)

    adapter_name = layers[0].active_name
    weights = _plain_weights(model.model.language_model, adapter_name)
    new = {name: torch.zeros_like(tensor) for name, tensor in decoder.state_dict().items() if name not in weights}
    decoder.load_state_dict({**weights, **new})
    head = _plain_weights(model.lm_head, adapter_name)
    for name, tensor in plain.get_output_embeddings().named_parameters():
        tensor.copy_(head[name]) if name in head else tensor.zero_()
    for row, layer in zip(table[:, MODALITIES[modality]], layers, strict=True):
        for place in places[layer.key]:
            linear = decoder.get_submodule(place)
            weight, bias = _folded(linear, layer, row)
            linear.bias.copy_(bias)
            (linear.weight.T if isinstance(linear, Conv1D) else linear.weight).copy_(weight)
    plain.tie_weights()
    if model.generation_config is not None:
        plain.generation_config = copy.deepcopy(model.generation_config)
    plain.eval()
    if dtype in (torch.float32, torch.float64):  # in others rounding is as large as what would be seen
        with _all_in_eval(model):
            given = {"inputs_embeds": probe_embeds(model), "use_cache": False}
            expected = model(**given, modality_ids=torch.full((2,), MODALITIES[modality], device=table.device)).logits
        if not (error := (plain(**given).logits - expected).norm() / expected.norm()) < 1e-3:
            raise ValueError(
                f"The adapter cannot be folded into a plain {config.model_type}: it computes something else then "
                f"(relative difference {error:.1e}). Keep the adapter attached for this architecture."
            )
    return plain


def _decoder(plain, model) -> nn.Module:
    """What a causal language model has of the class of LaVIN's own language model."""
    return next(module for module in plain.modules() if type(module) is type(model.model.language_model))


def _with_biases(model, places: list[str]):
    """
    A language model's configuration with which all these maps have a bias.

    Raises:
        `ValueError`: if there is none.
    """
    text_config = model.config.text_config
    flags = [name for name, value in text_config.to_dict().items() if "bias" in name and value is False]
    for chosen in ((), *((flag,) for flag in flags), flags):
        config = copy.deepcopy(text_config)
        for flag in chosen:
            setattr(config, flag, True)
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(config)
        decoder = _decoder(plain, model)
        without = [place for place in places if decoder.get_submodule(place).bias is None]
        if not without:
            return config
    raise ValueError(
        f"A {text_config.model_type} cannot take a bias on {without[0]}, which a folded adapter needs: keep the "
        "adapter attached for this architecture, or fold it for both modalities with `fold()`."
    )


def _plain_weights(module: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """A module's weights under their own names, those of `modules_to_save` as the adapter trained them."""
    weights, trained = {}, {}
    for name, tensor in module.state_dict().items():
        if f"modules_to_save.{adapter_name}." in name:
            trained[name.replace(f"modules_to_save.{adapter_name}.", "")] = tensor
        elif ".adapter_" not in name and "modules_to_save." not in name:
            weights[name.replace(".base_layer", "").replace("original_module.", "")] = tensor
    return {**weights, **trained}


def _plain_name(layer, name: str) -> str:
    """A map's name in the language model without adapters; `name` is that in the adapted module."""
    key = f"{layer.key}.{name}".rstrip(".").removeprefix("language_model.")
    return key.replace(f".modules_to_save.{layer.active_name}", "").replace(".base_layer", "")


def _wide(linear: nn.Module) -> torch.Tensor:
    """A map's weight, `(out, in)`, in float64."""
    return (linear.weight.T if isinstance(linear, Conv1D) else linear.weight).double()


def _seen(linear: nn.Module, layer, row: torch.Tensor) -> torch.Tensor:
    """The up maps mixed by the expert weights `row`, and their bias, through a map behind them: `(out, r + 1)`."""
    scale = layer.adapter_config[layer.active_name].scale
    dense = layer.adapter_up[layer.active_name].dense().double() * scale  # (experts, r + 1, in)
    return _wide(linear) @ (row.to(dense)[:, None, None] * dense).sum(0).T


def _folded(linear: nn.Module, layer, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight, `(out, in)`, and bias of a map that reads the layer's input, for the expert weights `row`."""
    down, seen = layer.adapter_down[layer.active_name], _seen(linear, layer, row)
    bias = seen[:, :-1] @ down.bias.double() + seen[:, -1]
    weight = _wide(linear) + seen[:, :-1] @ down.weight.double()
    return weight, bias if linear.bias is None else linear.bias.double() + bias


class FoldedLinear(nn.Module):
    """
    A linear map with folded weights for either modality: one product where all rows of a batch share theirs. What
    those weights differ by has the adapter's rank, so a batch of both takes the text's and adds that for its rows with
    an image.
    """

    def __init__(self, linear: nn.Module, layer, rows: torch.Tensor):
        super().__init__()
        self.routing = layer.routing
        down = layer.adapter_down[layer.active_name]
        pairs = zip(*(_folded(linear, layer, row) for row in rows), strict=True)
        weight, bias = (torch.stack(pair) for pair in pairs)
        values = {
            "weight": weight,
            "bias": bias,
            "down": F.pad(down.weight, (0, 0, 0, 1)),  # with an output that is always 1, for the up maps' bias
            "down_bias": F.pad(down.bias, (0, 1), value=1.0),
            "difference": _seen(linear, layer, rows[1] - rows[0]).T.contiguous(),
        }
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value.to(linear.weight.dtype), requires_grad=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = self.routing.rows
        if isinstance(rows, int):
            return F.linear(x, self.weight[rows], self.bias[rows])
        if x.ndim != 3:  # rows and positions in one
            length = x.shape[:-1].numel() // rows.shape[0]
            rows = rows.expand(-1, length, 1).reshape(*x.shape[:-1], 1)
        text = F.linear(x, self.weight[0], self.bias[0])
        mixed = F.linear(x, self.down, self.down_bias) * rows.to(x.dtype)
        return torch.addmm(text.flatten(0, -2), mixed.flatten(0, -2), self.difference).view_as(text)


@torch.no_grad()
def fold_both(model):
    """See `LavinForConditionalGeneration.fold`."""
    layers = _check_foldable(model)
    readers, table = _checked_readers(model, layers)  # before anything changes
    for layer, rows in zip(layers, table, strict=True):
        _put_folded(layer, layer, readers[layer.key], rows)
    routing = model.model.routing
    wrapped = {layer.key: layer.base_layer for layer in routing.layers}
    for key, module in wrapped.items():
        parent, _, name = key.rpartition(".")
        setattr(model.model.get_submodule(parent), name, module)
    routing.layers.clear()
    routing.forget()
    routing.folded = True
    model._hf_peft_config_loaded = False  # transformers' own switches refuse from here on
    return model.eval()


def _put_folded(holder: nn.Module, layer, names: list[str], rows: torch.Tensor):
    """Puts folded maps in the place of those that read the input of `holder.base_layer`."""
    for name in names:
        parent, _, last = f"base_layer.{name}".rstrip(".").rpartition(".")
        parent = holder.get_submodule(parent)
        setattr(parent, last, FoldedLinear(getattr(parent, last), layer, rows))


def _checked_readers(model, layers) -> tuple[dict[str, list[str]], torch.Tensor]:
    """
    The maps that read each layer's input, and the routing table. A copy of each adapted module is folded in float32,
    where rounding hides nothing, and compared with the module as it is.
    """
    with _all_in_eval(model):
        readers, calls = find_readers(model, layers)
        table = model.model.routing_table()
        for layer, rows in zip(layers, table, strict=True):
            _check_fold(layer, readers[layer.key], rows, *calls[layer.key])
    return readers, table


@contextlib.contextmanager
def _all_in_eval(model):
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        model.model.routing.forget()


def _check_fold(layer, names: list[str], rows: torch.Tensor, args: tuple, kwargs: dict):
    """
    Raises:
        `ValueError`: if the module with folded maps does not compute what it computes on the adapted input.
    """
    holder = nn.Module()
    holder.base_layer = copy.deepcopy(layer.base_layer).float()
    name, x = layer.active_name, (args[0] if args else kwargs["hidden_states"]).float()

    def output(x):
        given = ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})
        given = tree_map(lambda v: v.float() if torch.is_tensor(v) and v.is_floating_point() else v, given)
        out = holder.base_layer(*given[0], **given[1])
        return (out[0] if isinstance(out, tuple) else out).double()

    a = layer.adapter_down[name](x)
    expected = output(layer.adapter_up[name](x, a, rows.to(x).unsqueeze(1), layer.adapter_config[name].scale))
    _put_folded(holder, layer, names, rows)
    layer.routing.rows = torch.arange(2, device=x.device, dtype=x.dtype)[:, None, None]
    try:
        error = (output(x) - expected).norm() / expected.norm()
    finally:
        layer.routing.rows = None
    if not error < 1e-3:
        raise ValueError(
            f"Cannot fold {layer.key}: with its maps {', '.join(names)} folded it computes something else (relative "
            f"difference {error:.1e}). Keep the adapter attached for this architecture."
        )


class LavinFoldingMixin:
    """Folding of a LaVIN's adapter into weights."""

    def merge_modality(self, modality: str) -> PreTrainedModel:
        """
        Folds the language model's active adapter into a plain language model for one modality: with
        U = s (w0 B + w1 D), each map that reads an adapted input becomes `W' = W (I + U A)`,
        `b' = b + W (U a0 + s (w0 b0 + w1 d0))`.

        Args:
            modality (`str`):
                `"text"`, or `"image"` for prompts that hold an image (as `inputs_embeds` with the image tokens in it).

        Returns:
            `PreTrainedModel`: the text architecture's own causal language model, without any adapter. A Llama has
            `attention_bias=True`.

        Raises:
            `ValueError`: if the architecture's maps take no bias, an adapted input goes into anything but linear maps,
                the result would compute something else, the base is quantised or offloaded, or no adapter is active.
        """
        return fold_modality(self, modality)

    def fold(self):
        """
        Folds the language model's active adapter into its own maps, in place, for both modalities: each map that reads
        an adapted input gets one weight for text and one for prompts with an image, and every row goes through its
        own. Generation then costs what the base's does (some percent more in a batch that mixes both); the memory of
        those maps doubles, a quarter of a Llama's. The maps are found by following the adapted input through forwards,
        and each folded module is compared with what it was. The vision tower's adapters route by token and stay.

        Returns:
            [`LavinForConditionalGeneration`]: this model, in eval mode. From here on it cannot be trained or saved,
            and adapters can neither be switched nor added.

        Raises:
            `ValueError`: if an adapted input goes into anything but linear maps (a norm, experts, a residual inside),
                the base is quantised or offloaded, no adapter is active, or it is folded already. Nothing has changed
                then.
        """
        return fold_both(self)

    def save_pretrained(self, *args, **kwargs):
        self.model.routing.check_not_folded()
        return super().save_pretrained(*args, **kwargs)
