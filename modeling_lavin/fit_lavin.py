"""Whether two architectures can be a LaVIN: shown before anything is written, with none of their weights."""

import contextlib
import copy
import inspect

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, PreTrainedConfig
from transformers.initialization import no_init_weights

from .adapters_lavin import find_blocks
from .configuration_lavin import sides


ROWS = 64  # of the vocabulary, for a comparison
IDS = ((3, 9, 4, 17, 5), (0, 8, 21, 6, 3))
MASK = ((1, 1, 1, 1, 1), (0, 1, 1, 1, 1))
SHOWN: dict[tuple, str | None] = {}  # what was found of a configuration, once in a process
NO_TEXT = "{} is no language model for a LaVIN (its type is {}): {}. Name a decoder as Llama, Mistral or Qwen are."
NO_VISION = "{} is no vision tower for a LaVIN (its type is {}): {}. Name a CLIP, SigLIP, DINOv2, DINOv3, ViT or BEiT."


def architecture(auto_class, config: PreTrainedConfig) -> type | None:
    """The class that an Auto class gives for a configuration, if any."""
    found = auto_class._model_mapping.get(type(config), None)
    return found[0] if isinstance(found, (tuple, list)) else found


def on_meta(model_class: type, config: PreTrainedConfig) -> nn.Module:
    """A model without memory. The class itself: `from_config` would initialise it under ZeRO-3."""
    with torch.device("meta"), no_init_weights():
        return model_class(config).eval()


def nothing_drawn_on_meta():
    """A context for making modules: where they get no memory, drawing their weights takes its time for nothing."""
    return no_init_weights() if torch.empty(0).device.type == "meta" else contextlib.nullcontext()


def check_text(config: PreTrainedConfig, name: str = "The text checkpoint"):
    """
    Compares LaVIN's way with the architecture's own causal language model: a bias-free linear map on what the base
    makes of embedded ids. Both run with blocks that hand on what they get and a vocabulary of some rows, so that all
    that is before, between and after the blocks is as in the full model, and needs no memory.

    Raises:
        `ValueError`: if the two differ; it says where.
    """
    key = type(config), config.to_json_string(use_diff=False)
    if key not in SHOWN:
        SHOWN[key] = _unfit_text(copy.deepcopy(config))
    if SHOWN[key] is not None:
        raise ValueError(NO_TEXT.format(name, config.model_type, SHOWN[key]))


def _unfit_text(config: PreTrainedConfig) -> str | None:
    own, base_class = architecture(AutoModelForCausalLM, config), architecture(AutoModel, config)
    if own is None or base_class is None:
        return "transformers has no causal language model of that type"
    if getattr(config, "quantization_config", None) is not None:
        return "it is quantised already; name the one it was made from, and quantise the whole as it is loaded"
    with torch.device("cpu"):
        try:
            model = on_meta(own, config)
        except Exception as error:  # any code of any architecture
            return f"its {own.__name__} cannot be made ({_cause(error)})"
        return _unfit_parts(model, base_class, config) or _first_difference(model)


def _unfit_parts(model: nn.Module, base_class: type, config: PreTrainedConfig) -> str | None:
    """What LaVIN has no place for, if anything."""
    base, head, width = model.base_model, model.get_output_embeddings(), getattr(config, "hidden_size", None)
    if type(base) is not base_class:
        return f"{type(model).__name__} is not built on {base_class.__name__}"
    embedding = base.get_input_embeddings()
    if not isinstance(head, nn.Linear) or not isinstance(embedding, nn.Embedding):
        return f"{type(model).__name__} has no embedding or head of the usual kind"
    if head.bias is not None:
        return "its head has a bias, which LaVIN's has not"
    if {head.in_features, embedding.embedding_dim} != {width}:
        return (
            f"its embedding and head have a width of {embedding.embedding_dim} and {head.in_features}, its blocks of "
            f"{width}"
        )
    if head.out_features != config.vocab_size:
        return f"its head has {head.out_features} rows for {config.vocab_size} ids"
    if not {"past_key_values", "cache"} & set(inspect.signature(base.forward).parameters):
        return "it takes no `past_key_values`, with which LaVIN generates"
    try:
        DynamicCache(config=config).get_seq_length()
    except (ValueError, AttributeError):  # all of it is one state
        return "it keeps a state in place of keys and values, which does not say how much of a row it has read"
    return None


def _first_difference(model: nn.Module) -> str | None:
    """What the causal language model does otherwise than LaVIN, if anything. The model is of no use afterwards."""
    blocks, errors = _outer_blocks(model.base_model), []
    if not blocks:
        return "it has no stack of blocks"
    _give_memory(model, blocks)
    for extra in (None, 0, 1, 2):  # what else blocks return: nothing, or a tuple of so many more
        try:
            return _compare(model, blocks, extra)
        except Exception as error:  # any code of any architecture
            errors.append(error)
    return f"it could not be compared with {type(model).__name__} ({_cause(errors[0])})"


def _cause(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _outer_blocks(base: nn.Module) -> list[nn.Module]:
    """The longest list of modules that lies in no other (a block may hold many experts), and others of its kind."""
    lists = [(name, list(m)) for name, m in base.named_modules() if isinstance(m, nn.ModuleList)]
    outer = [blocks for name, blocks in lists if blocks and not any(name.startswith(f"{n}.") for n, _ in lists)]
    kinds = {type(block) for block in max(outer, key=len, default=())}
    return [block for blocks in outer for block in blocks if kinds & {type(block) for block in blocks}]


def _give_memory(model: nn.Module, blocks: list[nn.Module]):
    """Values for all but the blocks; embeddings and head get some rows."""
    base, head = model.base_model, model.get_output_embeddings()
    inside = {id(module) for block in blocks for module in block.modules()}
    of_base = {id(module) for module in base.modules()}
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if id(module) in inside:
            continue
        if module._buffers:  # what is not saved is computed there, as in `from_pretrained`
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else torch.zeros_like(buffer, device="cpu")
            (base if id(module) in of_base else model)._init_weights(module)
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            shape = list(parameter.shape)
            if isinstance(module, nn.Embedding) or module is head:
                shape[0] = min(ROWS, shape[0])
            values = torch.empty(sum(shape) + 1).normal_(generator=generator)  # w[i, j] = v[i + j]: hardly any memory
            parameter = values.as_strided(shape, [1] * len(shape))
            module._parameters[name] = nn.Parameter(parameter, requires_grad=False)
        if getattr(module, "padding_idx", None) is not None and isinstance(module, nn.Embedding):
            module.padding_idx = None  # it may lie beyond those rows, and matters to gradients only


def _compare(model: nn.Module, blocks: list[nn.Module], extra: int | None) -> str | None:
    base, head = model.base_model, model.get_output_embeddings()
    read = []

    def hand_on(*args, **kwargs):
        states = args[0] if args else kwargs["hidden_states"]
        read.extend(_tensors((args, kwargs)))
        return states if extra is None else (states, *[None] * extra)

    for block in blocks:
        block.forward = hand_on
    ids, mask = torch.tensor(IDS), torch.tensor(MASK)
    common = {"attention_mask": mask, "use_cache": False, "return_dict": True}
    with torch.no_grad():
        logits = model(input_ids=ids, **common).logits
        read_own, read = read, []
        embeds = model.get_input_embeddings()(ids)
        states = base(inputs_embeds=embeds, position_ids=None, **common).last_hidden_state
        read_lavin, read = read, []
        if states.shape != embeds.shape:
            raise ValueError(f"its base makes {tuple(states.shape)} of {tuple(embeds.shape)}")
        lavin = head(states)
        try:
            base(inputs_embeds=embeds + 0.5, position_ids=None, **common)
        except Exception as error:  # any code of any architecture
            return f"it reads no embeddings but those of its ids ({_cause(error)})"
    if len(read_own) != len(read_lavin) or not all(map(torch.equal, read_own, read_lavin)):
        return "its blocks read the ids beside their embedding"
    if lavin.shape != logits.shape or not torch.equal(logits.float(), lavin.float()):
        return f"{type(model).__name__} does more than one linear map on what its base returns"
    return None


def _tensors(tree) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = [tree[key] for key in sorted(tree)]
    return [t for branch in tree for t in _tensors(branch)] if isinstance(tree, (list, tuple)) else []


def check_vision(config: PreTrainedConfig, name: str = "The vision checkpoint"):
    """
    Shows two images without memory to a tower without memory: LaVIN reads what leaves each block.

    Raises:
        `ValueError`: if it is no tower whose blocks all give the states of an image.
    """
    reason = _unfit_vision(config)
    if reason is not None:
        raise ValueError(NO_VISION.format(name, config.model_type, reason))


def _unfit_vision(config: PreTrainedConfig) -> str | None:
    tower_class = architecture(AutoModel, config)
    if tower_class is None:
        return "`AutoModel` has no tower of that type"
    if not hasattr(config, "image_size"):
        return "it has no `image_size`, one for all images"
    if not hasattr(config, "hidden_size"):
        return "it has no `hidden_size`, one for all its blocks"
    try:
        return _look(on_meta(tower_class, config), "meta")
    except Exception as error:  # any code of any architecture
        cause = _cause(error)
    try:  # some towers look at values: one block, with values
        shallow = copy.deepcopy(config)
        shallow.num_hidden_layers = 1
        with no_init_weights():
            return _look(tower_class(shallow).eval(), "cpu")
    except Exception:
        return f"it does not read an image by its pixels alone ({cause})"


def _look(tower: nn.Module, device: str) -> str | None:
    config, shapes = tower.config, []
    _, blocks = find_blocks(tower)
    if len(blocks) != getattr(config, "num_hidden_layers", None):
        return "its blocks are not one stack of `num_hidden_layers`"
    for block in blocks:
        block.register_forward_hook(lambda module, args, out: shapes.append(_tensors([out])[0].shape))
    pixels = torch.zeros(2, getattr(config, "num_channels", 3), *sides(config.image_size), device=device)
    with torch.device(device), torch.no_grad(), _Drawing() as drawing:
        last = tower(pixels, return_dict=True).last_hidden_state
    if drawing.drawn:
        return "it draws random numbers (which patches it sees, for example), so that no image is read twice the same"
    if len(last.shape) != 3 or len(last) != 2 or last.shape[2] != config.hidden_size:
        return f"it makes {tuple(last.shape)} of two images, not (2, patches, {config.hidden_size})"
    if set(shapes) != {last.shape}:
        other = " and ".join(str(tuple(shape)) for shape in sorted(set(shapes) - {last.shape}))
        return f"its blocks give {other}, not all the {tuple(last.shape)} that it ends with"
    return None


class _Drawing(TorchDispatchMode):
    """Notes whether random numbers were drawn."""

    drawn = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        may_draw = torch.Tag.nondeterministic_seeded in func.tags
        self.drawn |= may_draw and not any(name in str(func) for name in ("dropout", "attention"))  # for training
        return func(*args, **(kwargs or {}))


__all__ = ["check_text", "check_vision"]
