"""A row's modality is fixed at prefill: it lies in the cache, beside the row's keys and values."""

import functools

import torch
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast


# What transformers calls a cache in arguments and outputs: since 5.24 by another name.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


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
