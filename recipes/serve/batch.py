"""Rows that are decoded together: rows join between two steps, and leave when they are done."""

import dataclasses
import random
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F
from transformers import DynamicCache, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from lavin.routing_lavin import CACHE

from .answer import AnswerText


@dataclasses.dataclass(eq=False)
class Row:
    """
    One request, from its prompt to its last token.

    Args:
        input_ids (`torch.Tensor` of shape `(prompt_length,)`): The prompt; image tokens have their places in it.
        pixel_values (`torch.Tensor` of shape `(num_images, channels, height, width)`, *optional*): Its images.
        max_new_tokens (`int`): Longest answer, in tokens.
        text ([`AnswerText`]): Turns its tokens into text.
        emit (`Callable`): Takes each piece of text (`str`), then one [`Ended`] or [`Failed`]; called by the worker.
        temperature (`float`, *optional*, defaults to 0): 0 is greedy.
        top_p, top_k (*optional*): As in transformers; 1 and 0 keep every token.
        seed (`int`, *optional*): Of this row's own random numbers; by default another one each time.
    """

    input_ids: torch.Tensor
    pixel_values: torch.Tensor | None
    max_new_tokens: int
    text: AnswerText
    emit: Callable
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    tokens: list[int] = dataclasses.field(default_factory=list)
    generator: torch.Generator | None = None
    first_token_at: float | None = None  # time.monotonic()
    cancelled: bool = False
    ended: bool = False

    @property
    def so_far(self) -> torch.Tensor:
        """The prompt and the tokens that are there: what is prefilled, of a row that begins again too."""
        return torch.cat([self.input_ids, self.input_ids.new_tensor(self.tokens)])

    @property
    def cached(self) -> int:
        """Tokens in the cache: the prompt and all new tokens but the last."""
        return len(self.input_ids) + len(self.tokens) - 1

    @property
    def final_length(self) -> int:
        return len(self.input_ids) + self.max_new_tokens


@dataclasses.dataclass
class Ended:
    """The answer is complete: `"stop"` (its own end, or a stop string) or `"length"`."""

    reason: str


@dataclasses.dataclass
class Failed:
    """No (further) answer: an HTTP status and why."""

    status: int
    message: str


class RowBatch:
    """
    Rows aligned on the right: what is left of a row's first token is padding, which its attention mask leaves out.

    Attributes:
        rows (`list[Row]`): The rows, in the order of the tensors.
        cache (`DynamicCache`): Keys and values of all tokens but each row's last, and each row's modality.
        mask (`torch.Tensor` of shape `(rows, cached_length)`): 1 where a row has a token.
        last (`torch.Tensor` of shape `(rows,)`): Each row's last token.
    """

    def __init__(self, model, rows: list[Row]):
        self.model, self.rows = model, list(rows)
        device = model.device
        read = [row.so_far for row in rows]
        length = max(map(len, read))
        pad = 0 if model.config.image_token_id != 0 else 1  # any token: the mask leaves it out
        ids = [F.pad(ids, (length - len(ids), 0), value=pad) for ids in read]
        mask = [F.pad(torch.ones_like(ids), (length - len(ids), 0)) for ids in read]
        images = [row.pixel_values for row in rows if row.pixel_values is not None]
        self.mask = torch.stack(mask).to(device)
        self.cache = DynamicCache(config=model.config.get_text_config())
        self.scores = self._forward(torch.stack(ids).to(device), torch.cat(images).to(device) if images else None)

    def _forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor | None = None) -> torch.Tensor:
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=self.mask,
            position_ids=positions,
            cache=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return outputs.logits[:, -1].float()

    def step(self):
        """One more token's scores for every row."""
        self.mask = F.pad(self.mask, (0, 1), value=1)
        self.scores = self._forward(self.last[:, None])

    def choose(self) -> list[int | None]:
        """Each row's next token; None where the model's scores are not finite."""
        scores, image_token_id = self.scores, self.model.config.image_token_id
        finite = scores.isfinite().all(-1)
        scores = scores.masked_fill(~finite[:, None], 0.0)  # sampling from NaN would stop a GPU for good
        if image_token_id < scores.shape[-1]:
            scores[:, image_token_id] = -torch.inf  # a padded vocabulary holds it; `generate` leaves it out too
        self.last = scores.argmax(-1)
        for i, row in enumerate(self.rows):
            if row.temperature > 0:
                self.last[i] = sample(scores[i : i + 1], row)
        self.scores = None
        tokens, finite = torch.stack([self.last, finite.long()]).tolist()  # the step's one wait for the device
        now = time.monotonic()
        for row in self.rows:
            row.first_token_at = row.first_token_at or now
        return [token if is_finite else None for token, is_finite in zip(tokens, finite, strict=True)]

    def keep(self, kept: list[int]):
        """Drops all rows but these, and the columns that no row needs any more."""
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in kept]
        if not kept:
            self.cache = self.mask = self.last = None
            return
        indices = torch.tensor(kept, device=self.mask.device)
        width = max(row.cached for row in self.rows)
        self.cache.batch_select_indices(indices)
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[..., -width:, :], layer.values[..., -width:, :]
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = width
        self.mask, self.last = self.mask[indices, -width:], self.last[indices]

    def join(self, other: "RowBatch"):
        """Takes another batch's rows. When it raises (no memory), this batch is as before."""
        own, width = len(self.rows), max(self.mask.shape[1], other.mask.shape[1])
        masks = [F.pad(mask, (width - mask.shape[1], 0)) for mask in (self.mask, other.mask)]
        mask, last = torch.cat(masks), torch.cat([self.last, other.last])
        modality = torch.cat([self.cache.modality_ids, other.cache.modality_ids])
        before = []
        try:
            for layer, new in zip(self.cache.layers, other.cache.layers, strict=True):
                stored = layer.keys.shape[-2]
                layer.keys, layer.values = stacked(layer.keys, new.keys), stacked(layer.values, new.values)
                before.append(stored)
        except Exception:
            for layer, stored in zip(self.cache.layers, before, strict=False):
                layer.keys, layer.values = (x[:own, :, -stored:] for x in (layer.keys, layer.values))
            raise
        for layer in self.cache.layers:
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = width
        self.rows += other.rows
        self.mask, self.last, self.cache.modality_ids = mask, last, modality


def stacked(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Keys or values `(rows, heads, length, width)` of two batches in one, the shorter padded on the left."""
    length = max(first.shape[-2], second.shape[-2])
    return torch.cat([F.pad(x, (0, 0, length - x.shape[-2], 0)) for x in (first, second)])


def sample(scores: torch.Tensor, row: Row) -> torch.Tensor:
    """One token of one row, `scores` `(1, vocab_size)`, with the row's own random numbers."""
    if row.generator is None:
        seed = random.SystemRandom().getrandbits(62) if row.seed is None else row.seed
        row.generator = torch.Generator(scores.device).manual_seed(seed)
    warpers = [TemperatureLogitsWarper(row.temperature)]  # in the order of `generate`
    if row.top_k > 0:
        warpers.append(TopKLogitsWarper(row.top_k))
    if row.top_p < 1:
        warpers.append(TopPLogitsWarper(row.top_p))
    for warper in warpers:
        scores = warper(None, scores)
    return torch.multinomial(scores.softmax(-1), 1, generator=row.generator)[0, 0]


def check_cache(model):
    """
    Raises:
        `ValueError`: if the language model keeps anything else between steps than keys and values by column, so that
            rows of different length cannot share a batch.
    """
    text = model.config.get_text_config()
    ids = torch.tensor([[0 if model.config.image_token_id != 0 else 1] * 2], device=model.device)
    with torch.inference_mode():
        cache = getattr(model(input_ids=ids, use_cache=True), CACHE)
    layers = getattr(cache, "layers", [])
    kinds = {type(layer).__name__ for layer in layers if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)}
    kinds |= {kind for kind in getattr(text, "layer_types", None) or [] if kind.startswith("chunked")}
    if kinds or not isinstance(cache, DynamicCache):
        found = ", ".join(sorted(kinds)) or type(cache).__name__
        raise ValueError(
            f"`lavin serve` cannot batch a {text.model_type}: its cache has {found}. "
            "It joins rows where every layer keeps keys and values, of all tokens or of a sliding window. Use "
            "`lavin ask` or `generate`."
        )
