"""
Routing, the core of LaVIN (arXiv 2305.15023, section 3.2): the language model's experts are weighted by each row's
modality, which is fixed at prefill and lies in the cache beside the row's keys and values.
"""

import contextlib
import functools
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast


# What transformers calls a cache in arguments and outputs: since 5.24 by another name.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
FOLDED = (
    "This LaVIN is folded: its adapter has become part of the weights of both modalities, for inference only. To "
    "train, save or switch it, load the folder that it came from again."
)
IMAGE_AFTER_TEXT = (
    "An image after a cached prefix without one: the prefix was computed as text only and cannot be made right "
    f"afterwards. Start again without `{CACHE}`."
)


@dataclass
class KeptRouting:
    """
    What serves every forward of one [`MMARouting.keep`], where gradients are off.

    Attributes:
        table (`torch.Tensor`, *optional*): the routing table, `(layers, 2 modalities, 2 experts)`.
        maps (`dict`): each layer's maps, see [`MMALayer.kept_maps`].
    """

    table: torch.Tensor | None = None
    maps: dict = field(default_factory=dict)

    def clear(self):
        self.table = None
        self.maps.clear()


class MMARouting:
    """
    Carries the routing weights of the current forward to the MMA layers of one [`LavinModel`]. Where several threads
    call one model, their forwards run one after another, see [`alone`].

    Attributes:
        layers (`list[MMALayer]`): the adapted modules of the language model, in the order of their depth.
        weights (`dict[str, torch.Tensor]`, *optional*): of each layer, by its key, `(batch, 2)`.
        collected (`dict[str, torch.Tensor]`, *optional*): filled during the routing pass, `(2 modalities, 2 experts)`.
        kept (`KeptRouting`, *optional*): of earlier forwards of this thread, within [`keep`].
        folded (`bool`): the language model's layers are gone, folded into its maps for both modalities.
        rows (`int` or `torch.Tensor`, *optional*): for folded maps, see `rows_of`.
    """

    def __init__(self):
        self.layers = []
        self.weights = None
        self.collected = None
        self.kept = None
        self.folded = False
        self.rows = None
        self._by_thread, self._lock = {}, threading.RLock()

    def __getstate__(self):
        return {**vars(self), "kept": None, "_by_thread": {}, "_lock": None}  # of copies and pickles

    def __setstate__(self, state: dict):
        vars(self).update(state, _lock=threading.RLock())

    @contextmanager
    def keep(self):
        """
        Within it the routing table is made once. Whoever enters it says that no weight, no autocast and no other
        adapter changes meanwhile: a fused optimiser, `functional_call` or an adapter of another type leave no trace
        by which a table of theirs could be told from a new one. (A change of MMA adapter is seen.)
        """
        thread = threading.get_ident()
        outer = self._by_thread.get(thread)
        with self._lock:  # not while another thread is in a forward
            self.kept = self._by_thread[thread] = outer or KeptRouting()
        try:
            yield
        finally:
            if outer is None:
                with self._lock:
                    del self._by_thread[thread]
                    self.kept = None

    @contextmanager
    def alone(self):
        """For one thread at a time: what a forward leaves here is no other thread's."""
        with self._lock:
            self.kept = self._by_thread.get(threading.get_ident())
            yield

    def forget(self):
        """After a change of adapter."""
        for kept in self._by_thread.values():
            kept.clear()

    def check_not_folded(self):
        """Raises `ValueError` where the adapter is no part of its own any more."""
        if self.folded:
            raise ValueError(FOLDED)

    def active_layers(self) -> list:
        return [layer for layer in self.layers if layer.active]

    def add(self, layer):
        self.layers.append(layer)
        self.layers.sort(key=lambda layer: [int(p) if p.isdigit() else p for p in layer.key.split(".")])

    def usable(self) -> KeptRouting | None:
        """What is kept, where it may serve: not where a backward may follow."""
        return None if torch.is_grad_enabled() else self.kept


def alone(routing: MMARouting):
    """[`MMARouting.alone`], but for compiled code, which can hold no lock."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else routing.alone()


def computing_device(module: nn.Module) -> torch.device:
    """Where a module computes: of one whose weights accelerate brings for each forward, where it brings them."""
    device = next(module.parameters()).device
    if device.type == "meta":
        for part in module.modules():
            hook = getattr(part, "_hf_hook", None)
            for one in getattr(hook, "hooks", [hook]):
                if getattr(one, "execution_device", None) is not None:
                    return torch.device(one.execution_device)
    return device


def checkpoint_routed(routing: MMARouting, checkpoint_function, function, *args, **kwargs):
    """Checkpoints a block so that its recomputation sees the routing of its own forward, not of a later one."""
    if routing.collected is not None:  # the routing pass: its weights leave the block, so it is never recomputed
        return function(*args, **kwargs)
    weights = routing.weights

    def run(*args, **kwargs):
        with alone(routing):  # a recomputation is in the backward's thread
            current, routing.weights = routing.weights, weights
            try:
                return function(*args, **kwargs)
            finally:
                routing.weights = current

    return checkpoint_function(run, *args, **kwargs)


def rows_of(modality_ids: torch.Tensor, dtype: torch.dtype) -> int | torch.Tensor:
    """The modality of all rows where they share one (compiled code cannot look), else 1 for each row with an image."""
    if not torch.compiler.is_compiling():
        found = modality_ids.tolist()
        if len(set(found)) == 1:
            return found[0]
    return modality_ids.to(dtype)[:, None, None]


class ModalityCacheMixin:
    """A cache that also holds `modality_ids`, which follow its rows and fall with its contents."""

    modality_ids: torch.Tensor | None = None

    def reset(self):
        super().reset()
        self.modality_ids = None

    def crop(self, *args, **kwargs):
        super().crop(*args, **kwargs)
        if self.get_seq_length() == 0:
            self.modality_ids = None

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        if self.modality_ids is not None:
            self.modality_ids = self.modality_ids[beam_idx.to(self.modality_ids.device)]

    def batch_repeat_interleave(self, repeats):
        super().batch_repeat_interleave(repeats)
        if self.modality_ids is not None:
            self.modality_ids = self.modality_ids.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        if self.modality_ids is not None:
            self.modality_ids = self.modality_ids[indices]

    def __reduce__(self):
        # The class is made at run time, so copies and pickles name the one it is made from.
        return _restore, (type(self).__mro__[2], self.__dict__)


@functools.cache
def _with_modality(cache_class: type) -> type:
    return type(cache_class.__name__, (ModalityCacheMixin, cache_class), {})


def _restore(cache_class: type, state: dict) -> Cache:
    cache_class = _with_modality(cache_class)
    cache = cache_class.__new__(cache_class)
    cache.__dict__.update(state)
    return cache


def carry_modality(cache: Cache):
    """Makes a cache of any class keep its rows' modality through reordering, selection and reset."""
    if not isinstance(cache, ModalityCacheMixin):
        cache.__class__ = _with_modality(type(cache))


def cached_modality(cache: Cache | None, batch_size: int, device) -> torch.Tensor | None:
    """
    Modality of each row of the cached prefix, `(batch_size,)`; None if nothing is cached. A prefix that was not
    computed by a LaVIN is text.

    Raises:
        `ValueError`: if the cache holds another number of rows.
    """
    if cache is None:
        return None
    modality_ids = getattr(cache, "modality_ids", None)
    if modality_ids is None:
        if torch.compiler.is_compiling() or int(cache.get_seq_length()) == 0:
            return None
        return torch.zeros(batch_size, dtype=torch.long, device=device)
    if modality_ids.shape[0] != batch_size:
        raise ValueError(f"The cache holds {modality_ids.shape[0]} rows, the input {batch_size}.")
    return modality_ids.to(device)


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """A cache, given by either of its names."""
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("`cache` and `past_key_values` are two names of one argument: pass one of them.")
    return past_key_values if cache is None else cache


def row_modality(modality_ids, has_image, cache, batch_size, device):
    """Each row's modality, `(batch_size,)`: the cache's, or what the caller states, or whether it has an image."""
    cached = cached_modality(cache, batch_size, device)
    stated = modality_ids if modality_ids is not None else has_image
    if stated is not None and tuple(stated.shape) != (batch_size,):
        raise ValueError(f"`modality_ids` must be of shape ({batch_size},), one per row; got {tuple(stated.shape)}.")
    if stated is None:
        return torch.zeros(batch_size, dtype=torch.long, device=device) if cached is None else cached
    stated = stated.to(device, torch.long)
    if cached is None:
        return stated
    if not torch.compiler.is_compiling() and bool((stated > cached).any()):
        raise ValueError(IMAGE_AFTER_TEXT)
    return cached


def routing_table(model) -> torch.Tensor:
    """
    Expert weights of every adapted module of the language model, `(layers, 2 modalities, 2 experts)`: one forward
    of the language model on the two modality embeddings, each a sequence of length one.

    Raises:
        `ValueError`: if no MMA adapter is active there.
    """
    embedding = model.get_input_embeddings()
    embedding = getattr(embedding, "original_module", embedding)  # a trained one may be wider than what follows
    ids = torch.arange(2, device=computing_device(embedding))
    routing = model.routing
    if not routing.active_layers():
        raise ValueError("No MMA adapter is active in the language model: there is no routing.")
    with alone(routing):
        routing.collected = {}
        try:
            model.language_model(
                inputs_embeds=model.modality_embedding(ids).unsqueeze(1).to(ids.device, embedding.weight.dtype),
                position_ids=torch.zeros_like(ids[:1]).unsqueeze(0),
                use_cache=False,
            )
            # Under `device_map` the layers may be on several devices.
            return torch.stack([routing.collected[layer.key].to(ids.device) for layer in routing.active_layers()])
        finally:
            routing.collected = None


def usable_table(model) -> torch.Tensor:
    """The kept routing table where there is one that may serve, else a new one."""
    kept = model.routing.usable()
    if kept is None:
        return model.routing_table()
    if kept.table is None:
        kept.table = model.routing_table()
    return kept.table


@contextmanager
def routed(model, modality_ids: torch.Tensor, dtype: torch.dtype):
    """
    Within it the language model's experts are weighted by its rows' modality.

    Args:
        model ([`LavinModel`]): The model.
        modality_ids (`torch.LongTensor` of shape `(batch_size,)`): 1 for rows with an image, 0 for others.
        dtype (`torch.dtype`): Of the states, for folded maps.

    Raises:
        `ValueError`: if the adapter is folded, and the model in training.
    """
    routing = model.routing
    if routing.folded and model.training:
        raise ValueError(FOLDED)
    with alone(routing):
        if layers := routing.active_layers():
            weights = usable_table(model)[:, modality_ids].unbind(0)
            routing.weights = {layer.key: weight for layer, weight in zip(layers, weights, strict=True)}
        if routing.folded:
            routing.rows = rows_of(modality_ids, dtype)
        try:
            yield
        finally:
            routing.weights = routing.rows = None
