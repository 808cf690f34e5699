"""Which maps read the input of an adapted module: found by what happens to that input, in any architecture."""

from collections import Counter

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from .routing_lavin import computing_device


NOT_FOLDED = "Keep the adapter attached for this architecture, or leave this module out of `target_modules`."
# What has the same values in the same order, though in other memory.
COPIES = ("to", "type", "type_as", "float", "half", "bfloat16", "double", "contiguous", "clone", "reshape", "dropout")
# What gives no tensor, and yet depends on values, or changes them.
VALUES = ("item", "tolist", "numpy", "equal", "allclose", "is_nonzero", "__setitem__", "__bool__", "__float__")


class InputProbe(TorchFunctionMode):
    """
    Follows the adapted inputs of modules through forwards.

    Attributes:
        maps (`dict[str, set]`): of each layer, by its key, the linear maps that read its input.
        calls (`dict[str, tuple]`): each layer's arguments in the first forward, its input not adapted.

    Raises:
        `ValueError`: where something else than a linear map reads such an input; the message names it.
    """

    def __init__(self, layers):
        super().__init__()
        self.maps, self.calls = {layer.key: set() for layer in layers}, {}
        self.ended = {}  # adapted inputs whose module has run, each with its layer
        self.running = []  # of each layer whose module runs: itself, the adapted input, and what is the same as it
        self.modules = []  # names of the modules that run in it
        self.inside = None  # the linear map that runs
        self.reads_more = set()  # maps that read other things
        self.handles = []
        for layer in layers:
            hooks = [layer.register_forward_pre_hook(self._called, with_kwargs=True)]
            hooks.append(layer.base_layer.register_forward_pre_hook(self._starting(layer), with_kwargs=True))
            for name, module in layer.base_layer.named_modules():
                hooks.append(module.register_forward_pre_hook(self._entering(name)))
                hooks.append(module.register_forward_hook(self._left))
            hooks.append(layer.base_layer.register_forward_hook(self._ended))
            self.handles += hooks

    def close(self):
        for handle in self.handles:
            handle.remove()

    def _called(self, layer, args, kwargs):
        self.calls.setdefault(layer.key, (args, kwargs))

    def _starting(self, layer):
        def start(module, args, kwargs):
            x = args[0] if args else kwargs["hidden_states"]
            self.running.append((layer, x, {id(x): x}))

        return start

    def _entering(self, name):
        def enter(module, args):
            self.modules.append(name or type(module).__name__)
            if not isinstance(module, (nn.Linear, Conv1D)):
                return
            layer, _, same = self.running[-1] if self.running else (None, None, {})
            if args and id(args[0]) in same:
                self.maps[layer.key].add(module)
                self.inside = module
            else:
                self.reads_more.add(module)

        return enter

    def _left(self, module, args, output):
        self.modules.pop()
        if module is self.inside:
            self.inside = None

    def _ended(self, module, args, output):
        layer, _, same = self.running.pop()
        self.ended.update({key: (layer, value) for key, value in same.items()})  # held, so that no other has its id
        if any(id(value) in same for value in tree_leaves(output)):
            self._refuse(layer, "comes out of it again")

    def __torch_function__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if self.inside is None:
            # What takes another's shape or dtype reads no values of it.
            read = args[:1] if function.__name__.endswith("_as") else (args, kwargs)
            given = [id(value) for value in tree_leaves(read)]
            layer, x, same = self.running[-1] if self.running else (None, None, {})
            if any(key in same for key in given):
                self._follow(function.__name__, layer, x, same, output)
            if later := next((self.ended[key] for key in given if key in self.ended), None):
                self._refuse(later[0], f"goes into `{function.__name__}` after it has run")
        return output

    def _follow(self, name, layer, x, same, output):
        for value in tree_leaves(output):
            if name.endswith("_like") or name.startswith("new_") or not torch.is_tensor(value):
                continue
            copied = name in COPIES or value.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
            changed = name.endswith("_") and not name.endswith("__")
            if changed or not copied or value.shape[-1:] != x.shape[-1:] or value.numel() != x.numel():
                return self._refuse(layer, f"goes into `{name}`")
            if not torch.equal(value.reshape(x.shape), x.to(value.dtype)):
                return self._refuse(layer, f"goes into `{name}`")
            same[id(value)] = value
        if name in VALUES:
            self._refuse(layer, f"goes into `{name}`")

    def _refuse(self, layer, what: str):
        where = f" in {self.modules[-1]}" if self.modules else ""
        raise ValueError(
            f"Cannot fold {layer.key}: its input {what}{where}, and not into linear maps alone. {NOT_FOLDED}"
        )


def probe_embeds(model) -> torch.Tensor:
    """Two rows of noise as large as the embedding's rows, `(2, 6, hidden_size)`."""
    embedding = model.get_input_embeddings()
    weight = getattr(embedding, "original_module", embedding).weight
    noise = torch.randn(2, 6, weight.shape[1], generator=torch.Generator().manual_seed(0))
    return (noise * weight[:1000].float().std().cpu()).to(computing_device(embedding), weight.dtype)


@torch.no_grad()
def find_readers(model, layers) -> tuple[dict[str, list[str]], dict[str, tuple]]:
    """
    Names of the linear maps that read each layer's adapted input, from forwards of a few tokens: plain ones, with
    padding and a cache, and a step of decoding.

    Returns:
        `tuple(dict, dict)`: by the layers' keys, the names, relative to the adapted module ("" is the module itself),
            and the arguments of the first forward, with a row of each modality.

    Raises:
        `ValueError`: if something else reads an adapted input, or a map reads other things as well.
    """
    x = probe_embeds(model)
    ids, mask = torch.arange(2, device=x.device), torch.ones(x.shape[:2], dtype=torch.long, device=x.device)
    mask[0, :2] = 0
    probe = InputProbe(layers)
    try:
        with probe:
            model.model(inputs_embeds=x, modality_ids=ids, use_cache=False)
            cache = model.model(
                inputs_embeds=x[:, :5], modality_ids=ids, attention_mask=mask[:, :5], use_cache=True
            ).past_key_values
            if cache is not None:
                model.model(inputs_embeds=x[:, 5:], attention_mask=mask, past_key_values=cache, use_cache=True)
    finally:
        probe.close()
    found, times = {}, Counter(m for maps in probe.maps.values() for m in maps)
    for layer in layers:
        maps = probe.maps[layer.key]
        names = [n for n, m in layer.base_layer.named_modules(remove_duplicate=False) if m in maps]
        for name, module in layer.base_layer.named_modules():
            if isinstance(module, BaseTunerLayer) and any(f"{n}.".startswith(f"{name}.") for n in names):
                raise ValueError(
                    f"Cannot fold {layer.key}: {name} has another adapter. Delete that one, or merge it first."
                )
        if not names:
            raise ValueError(f"Cannot fold {layer.key}: no linear map reads its input. {NOT_FOLDED}")
        if any(m in probe.reads_more or times[m] > 1 for m in maps):
            raise ValueError(
                f"Cannot fold {layer.key}: one of {', '.join(names)} reads other things too. {NOT_FOLDED}"
            )
        found[layer.key] = names
    return found, probe.calls
