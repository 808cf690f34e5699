"""Training: which weights of a base (`trainable=[regex, ...]`), what must be finite, what gets a gradient anyway."""

import copy
import difflib
import functools
import re

import torch
from torch.utils.checkpoint import checkpoint
from transformers.integrations import deepspeed
from transformers.utils import logging

from .routing_lavin import checkpoint_routed


logger = logging.get_logger(__name__)


FROZEN = (
    "Every weight of this LaVIN is frozen, so training it would change nothing. Load it with `mma={}` "
    "(`from_pretrained(..., mma={})`; in a YAML for `trl sft`: `model_init_kwargs: {mma: {}}`) to train its adapter, "
    "or with `trainable=[regex, ...]` in its place to train parts of the base."
)
NO_DATA_PARALLEL = (
    "LaVIN does not run under `torch.nn.DataParallel`, which shares one routing table between threads. Start one "
    "process per GPU (`accelerate launch`, `torchrun`), or show one GPU only (`CUDA_VISIBLE_DEVICES=0`)."
)
QUANTISED = (
    "`trainable` trains weights of the base itself, and a quantised base (`load_in_4bit`, `load_in_8bit`) has none "
    "that can be trained: load it without, or train an adapter on it (`mma: {}`)."
)
BOTH = (
    "`mma` trains an adapter on a base that stays as it is, `trainable` changes the base: train them one after the "
    "other. First `trainable`, which writes a full folder; then `mma` on that folder. (The projector alone is part of "
    "the adapter, too.)"
)
EXISTING_ADAPTER = (
    "{name} holds an adapter ({adapter}/), which was trained on its base as it is: with `trainable` the base would "
    "change under it. Continue the adapter with `mma: {{}}`, or name the adapter's base."
)


def check_patterns(patterns) -> list[re.Pattern]:
    """
    Raises:
        `ValueError`: if `patterns` is no list of regular expressions.
    """
    if not isinstance(patterns, (list, tuple)) or not patterns or not all(isinstance(p, str) for p in patterns):
        raise ValueError(
            f"`trainable` must be a list of regular expressions, such as ['multi_modal_projector']; got {patterns!r}."
        )
    compiled = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise ValueError(f"`trainable`: {pattern!r} is no regular expression: {error}.") from error
    return compiled


def trained_names(model, patterns: list[str]) -> list[str]:
    r"""
    The parameters that patterns name, but for those that never get a gradient: the modality embedding, which only an
    adapter reads, and what lies in the vision tower behind the last state that is read.

    Args:
        model ([`LavinForConditionalGeneration`]): With or without weights (meta device).
        patterns (`list[str]`): Regular expressions, looked for anywhere in a parameter's name (`re.search`). A
            module's name is the beginning of its parameters' names, and so names them all: `multi_modal_projector`,
            `language_model.*\.(q|v)_proj\.`.

    Returns:
        `list[str]`: names, in the model's order. Tied weights are there under both names.

    Raises:
        `ValueError`: if a pattern matches nothing that can be trained; the message names the nearest names.
    """
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    wanted = {pattern.pattern: {n for n in names if pattern.search(n)} for pattern in check_patterns(patterns)}
    for pattern, matched in wanted.items():
        if not matched:
            raise ValueError(f"`trainable`: {pattern!r} matches no parameter. {_nearest(pattern, names)}")
    without = {name for name in names if "modality_embedding." in name}
    if any("vision_tower." in name for matched in wanted.values() for name in matched):
        without |= _unread(model)
    for pattern, matched in wanted.items():
        if not matched - without:
            raise ValueError(
                f"`trainable`: what {pattern!r} matches ({_few(sorted(matched))}) never gets a gradient. The modality "
                "embedding is for an adapter alone; what lies behind the last vision block that is read is not used."
            )
    chosen = set().union(*wanted.values()) - without
    return [name for name in names if name in chosen]


def _unread(model) -> set[str]:
    """Names of the vision tower's weights on which no image token depends, from a backward without any numbers."""
    probe = without_weights(model).requires_grad_(True).float()
    with torch.device("meta"):
        image = torch.empty(1, *probe.config.image_shape)
        with torch.enable_grad():
            probe.get_image_features(image, return_dict=True).pooler_output.sum().backward()
    return {n for n, p in probe.named_parameters() if "vision_tower." in n and p.grad is None}


def without_weights(model):
    """A model of the same configuration on the meta device, under ZeRO-3 too, where one would get weights."""
    held, deepspeed._hf_deepspeed_config_weak_ref = deepspeed._hf_deepspeed_config_weak_ref, None
    try:
        with torch.device("meta"):
            return type(model)(copy.deepcopy(model.config))
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = held


def _nearest(pattern: str, names: list[str]) -> str:
    """The names nearest to the words of a pattern that occur in none."""
    whole = {}  # each piece of a name, with the first name that has it
    for name in names:
        pieces = name.split(".")
        for i, piece in enumerate(pieces):
            whole.setdefault(piece, ".".join(pieces[: i + 1]))
    words = re.findall(r"[^\W\d]\w+", re.sub(r"\\[a-zA-Z]", " ", pattern))
    strange = [word for word in words if not any(word in piece for piece in whole)] or words
    near = [piece for word in strange for piece in difflib.get_close_matches(word, whole, 2)]
    modules = {name.rpartition(".")[0] for name in names}
    top = sorted({".".join(name.split(".")[:2]) for name in modules}, key=len)
    return f"The nearest names: {', '.join(whole[piece] for piece in near)}." if near else f"There are {_few(top)}."


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def set_trainable(model, names: list[str]):
    """Makes the named parameters, and no others, trainable, in float32. The base is then no checkpoint's any more."""
    wanted = set(names)
    if away := next((n for n, p in model.named_parameters(remove_duplicate=False) if n in wanted and p.is_meta), None):
        raise ValueError(f"`trainable`: {away} is offloaded, and cannot be trained: leave it out of `device_map`.")
    model.requires_grad_(False)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in wanted:
            parameter.data = parameter.data.float()  # read so already, but for what is new, such as a projector
            parameter.requires_grad_(True)
    model.trained_base = list(names)


def check_trained_finite(model, state_dict: dict[str, torch.Tensor]):
    """
    Raises:
        `FloatingPointError`: if a weight of the base that was trained holds NaN or infinity, or the output of the last
            training forward did. (Why not a `ValueError`: see `LavinFolderMixin._adapter_tensors`.)
    """
    if trained := getattr(model, "trained_base", None):
        check_finite(model, {name: state_dict[name] for name in trained if name in state_dict}, "model")


def check_finite(model, tensors: dict[str, torch.Tensor], what: str):
    """
    Raises:
        `FloatingPointError`: if one of the tensors, which are about to be saved, or the output of the model's last
            training forward holds NaN or infinity.
    """
    bad = next((name for name, value in tensors.items() if not value.isfinite().all()), None)
    last_finite = getattr(getattr(model, model.base_model_prefix, model), "last_finite", None)
    if bad is None and last_finite is not None and not last_finite:
        bad = "the output of the last training step"
    if bad is not None:
        raise FloatingPointError(
            f"The {what} is not saved: {bad} holds NaN or infinity. Training has diverged. What was saved before is "
            "left as it is: look at the losses in its trainer_state.json, go on from there with a lower learning "
            "rate, `max_grad_norm` or a longer warm-up."
        )


def unused_features(model, cache) -> torch.Tensor | None:
    """
    For training on a batch without images: something of all that is trained on the way of an image, so that it
    gets a gradient of zeros. With none at all AdamW would pass it over instead of following its momentum, and a
    run would depend on how its rows are laid out.

    In distributed training every rank must run the same modules in the same order as well (ZeRO hangs or crashes
    otherwise; ZeRO-3 without gradients too, in evaluation or for a reference): a rank without an image runs the
    vision tower on an empty one, before anything else. None elsewhere.
    """
    trains = model.training and torch.is_grad_enabled()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        first = next(model.vision_tower.parameters())
        alike = trains or (hasattr(first, "ds_id") and (cache is None or cache.get_seq_length() == 0))
        if alike and torch.distributed.get_world_size() > 1:
            image = torch.zeros((1, *model.config.image_shape), device=first.device)
            return model.get_image_features(image, return_dict=True).pooler_output
    if not trains:
        return None
    parameters = [*model.vision_tower.parameters(), *model.multi_modal_projector.parameters()]
    # ZeRO-3 gathers a partitioned weight only inside its own module.
    trained = [p.flatten()[:1] for p in parameters if p.requires_grad and not hasattr(p, "ds_id")]
    return torch.cat([first.to(trained[0]) for first in trained]) if trained else None


def check_training(model):
    """
    Raises:
        `ValueError`: if a training forward would change nothing, or goes wrong.
    """
    if model.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(FROZEN)
    if getattr(model, "_is_replica", False):
        raise ValueError(NO_DATA_PARALLEL)


class LavinTrainingMixin:
    """What a LaVIN does otherwise than [`PreTrainedModel`] to be trained."""

    def enable_input_require_grads(self):
        """For the language model's embedding. Vision towers need it for reentrant checkpointing only, see below."""
        self.disable_input_require_grads()
        hook = self.get_input_embeddings().register_forward_hook(lambda module, args, out: out.requires_grad_(True))
        self._require_grads_hooks, self._require_grads_hook = [hook], hook

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=checkpoint, **kwargs):
        if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            logger.warning(
                "Reentrant gradient checkpointing gives LaVIN's router and modality embedding no gradient: using "
                "`use_reentrant=False`, which is exact, under ZeRO-3 too."
            )
            gradient_checkpointing_func = functools.partial(
                gradient_checkpointing_func, **{**gradient_checkpointing_func.keywords, "use_reentrant": False}
            )
        routing = getattr(self, self.base_model_prefix, self).routing
        routed = functools.partial(checkpoint_routed, routing, gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable=enable, gradient_checkpointing_func=routed, **kwargs)
