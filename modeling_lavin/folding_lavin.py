"""Folds an MMA adapter into the plain language model of one modality (method.md's identity; arXiv 2305.15023)."""

import copy

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D


# Maps that read the input of an attention or MLP module, by architecture family.
READERS = (
    ("q_proj", "k_proj", "v_proj"),
    ("qkv_proj",),
    ("query_key_value",),
    ("c_attn",),
    ("gate_proj", "up_proj"),
    ("gate_up_proj",),
    ("c_fc",),
    ("fc1",),
)
MODALITIES = {"text": 0, "image": 1}


@torch.no_grad()
def fold_modality(model, modality: str):
    """See `LavinForConditionalGeneration.merge_modality`."""
    if modality not in MODALITIES:
        raise ValueError(f"`modality` must be 'text' or 'image', got {modality!r}.")
    if getattr(model, "is_quantized", False) or getattr(model, "is_loaded_in_4bit", False):
        raise ValueError("A quantised base cannot be folded: load it without `quantization_config`.")
    layers = model.model.routing.active_layers()
    if not layers:
        raise ValueError("No MMA adapter is active in the language model: there is nothing to fold.")
    for layer in layers:  # before anything is computed
        _reader_names(layer.base_layer, layer.key)
    table = model.model.routing_table()

    config = copy.deepcopy(model.config.text_config)
    for flag in ("attention_bias", "mlp_bias"):
        if hasattr(config, flag):
            setattr(
                config, flag, any(_is_mlp(layer) == (flag == "mlp_bias") for layer in layers) or getattr(config, flag)
            )
    if any(isinstance(module, ModulesToSaveWrapper) for module in (model.lm_head, model.get_input_embeddings())):
        config.tie_word_embeddings = False  # one of the two was trained
    dtype = model.get_input_embeddings().weight.dtype
    with torch.device(model.device):
        plain = AutoModelForCausalLM.from_config(config, dtype=dtype)
    decoder = getattr(plain, plain.base_model_prefix)
    for layer in layers:  # before anything is copied
        _readers(decoder.get_submodule(_path(layer)), layer.key)

    adapter_name = layers[0].active_name
    weights = _plain_weights(model.model.language_model, adapter_name)
    new = {name: torch.zeros_like(tensor) for name, tensor in decoder.state_dict().items() if name not in weights}
    decoder.load_state_dict({**weights, **new})
    plain.lm_head.load_state_dict(_plain_weights(model.lm_head, adapter_name))
    for row, layer in zip(table[:, MODALITIES[modality]], layers, strict=True):
        _fold_layer(decoder.get_submodule(_path(layer)), layer, row)
    plain.tie_weights()
    if model.generation_config is not None:
        plain.generation_config = copy.deepcopy(model.generation_config)
    return plain.eval()


def _plain_weights(module: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """A module's weights under their own names, those of `modules_to_save` as the adapter trained them."""
    weights, trained = {}, {}
    for name, tensor in module.state_dict().items():
        if f"modules_to_save.{adapter_name}." in name:
            trained[name.replace(f"modules_to_save.{adapter_name}.", "")] = tensor
        elif ".adapter_" not in name and "modules_to_save." not in name:
            weights[name.replace(".base_layer", "").replace("original_module.", "")] = tensor
    return {**weights, **trained}


def _path(layer) -> str:
    return layer.key.removeprefix("language_model.")


def _is_mlp(layer) -> bool:
    return any(
        name in dict(layer.base_layer.named_children()) for name in ("gate_proj", "gate_up_proj", "c_fc", "fc1")
    )


def _reader_names(module: nn.Module, key: str) -> tuple[str, ...]:
    names = next((names for names in READERS if all(hasattr(module, name) for name in names)), None)
    if names is None:
        raise ValueError(f"Cannot fold {key}: unknown maps {[name for name, _ in module.named_children()]}.")
    if other := next((name for name in names if isinstance(getattr(module, name), BaseTunerLayer)), None):
        raise ValueError(f"Cannot fold {key}: {other} has another adapter. Delete that one, or merge it first.")
    return names


def _readers(module: nn.Module, key: str) -> list[nn.Module]:
    names = _reader_names(module, key)
    maps = [getattr(module, name) for name in names]
    if any(linear.bias is None for linear in maps):
        raise ValueError(
            f"{type(module).__name__} cannot take a bias on {', '.join(names)}, which a folded adapter needs: keep "
            "the adapter attached for this architecture."
        )
    return maps


def _fold_layer(module: nn.Module, layer, row: torch.Tensor):
    for linear in _readers(module, layer.key):
        weight, bias = _folded(linear, layer, row)
        linear.bias.copy_(bias)
        (linear.weight.T if isinstance(linear, Conv1D) else linear.weight).copy_(weight)


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
        text = F.linear(x, self.weight[0], self.bias[0])
        mixed = F.linear(x, self.down, self.down_bias) * rows.to(x.dtype)
        return torch.addmm(text.flatten(0, -2), mixed.flatten(0, -2), self.difference).view_as(text)


def rows_of(modality_ids: torch.Tensor, dtype: torch.dtype) -> int | torch.Tensor:
    """The modality of all rows where they share one (compiled code cannot look), else 1 for each row with an image."""
    if not torch.compiler.is_compiling():
        found = modality_ids.tolist()
        if len(set(found)) == 1:
            return found[0]
    return modality_ids.to(dtype)[:, None, None]


@torch.no_grad()
def fold_both(model):
    """See `LavinForConditionalGeneration.fold`."""
    if getattr(model, "is_quantized", False) or getattr(model, "is_loaded_in_4bit", False):
        raise ValueError("A quantised base cannot be folded: load it without `quantization_config`.")
    routing = model.model.routing
    routing.check_not_folded()
    layers = routing.active_layers()
    if not layers:
        raise ValueError("No MMA adapter is active in the language model: there is nothing to fold.")
    names = {layer.key: _reader_names(layer.base_layer, layer.key) for layer in layers}  # before anything changes
    table = model.model.routing_table()
    for layer, rows in zip(layers, table, strict=True):
        for name in names[layer.key]:
            setattr(layer.base_layer, name, FoldedLinear(getattr(layer.base_layer, name), layer, rows))
    wrapped = {layer.key: layer.base_layer for layer in routing.layers}
    for key, module in wrapped.items():
        parent, _, name = key.rpartition(".")
        setattr(model.model.get_submodule(parent), name, module)
    routing.layers.clear()
    routing.forget()
    routing.folded = True
    model._hf_peft_config_loaded = False  # transformers' own switches refuse from here on
    return model.eval()
