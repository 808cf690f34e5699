"""Generation: each row's modality is fixed by its whole prompt, and the image token is never generated or drafted."""

import contextlib
import copy
import inspect

import torch
import transformers
from packaging.version import Version
from transformers import AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig
from transformers.generation import LogitsProcessorList, SuppressTokensLogitsProcessor
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import logging

from .projector_lavin import flat_features
from .routing_lavin import CACHE, alone, carry_modality, usable_table


logger = logging.get_logger(__name__)

IMAGE_ARGUMENTS = ("pixel_values", "mm_encoder_outputs", "modality_ids")
# Older ones give the chunks of a prompt no images, and read the tokens of a kept cache again.
CHUNKS_IMAGES = Version(transformers.__version__) >= Version("5.23")
# What transformers reads off a model's class and its two towers decide: the first by the language model, with which a
# LaVIN generates, the others by both.
TEXT_FLAGS = (
    "_is_stateful",
    "_can_compile_fullgraph",
    "_supported_generation_modes",
    "_supports_attention_backend",
    "_supports_context_parallel",
    "_compatible_flash_implementations",
    "supports_gradient_checkpointing",
)
ATTENTION_FLAGS = ("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn")


def kept_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The positions that logits are wanted for."""
    if isinstance(logits_to_keep, int):
        return hidden_states[:, slice(-logits_to_keep, None)]
    if logits_to_keep.ndim == 1:
        return hidden_states[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    return torch.take_along_dim(hidden_states, logits_to_keep[..., None], dim=1)


def context_length(config) -> int | None:
    """How many tokens a language model can read, prompt and answer together; `None` where it has no such limit."""
    length = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    kind = rope.get("rope_type") if isinstance(rope, dict) else None
    if length is None or kind == "dynamic":  # scaled as far as the prompt goes
        return None
    if kind in ("linear", "yarn"):  # some checkpoints state the length before scaling
        return max(length, int(rope.get("factor", 1) * (rope.get("original_max_position_embeddings") or length)))
    return length


def text_architecture(config) -> type:
    """The class that generates with the language model alone, which says how; of one without a head its decoder's."""
    kind = type(config.get_text_config())
    return AutoModelForCausalLM._model_mapping.get(kind, None) or AutoModel._model_mapping[kind]


def architecture_flags(config: PreTrainedConfig) -> dict:
    """What a LaVIN of these two towers can do, as their own classes say."""
    text, vision = text_architecture(config), AutoModel._model_mapping[type(config.vision_config)]
    flags = {name: getattr(text, name) for name in TEXT_FLAGS if hasattr(text, name)}
    return {**flags, **{name: getattr(text, name) and getattr(vision, name) for name in ATTENTION_FLAGS}}


def rope_switch(config) -> int | None:
    """
    The length beyond which a language model turns all of its positions otherwise, those in the cache included, and its
    own class therefore drops the cache (Phi-3's long RoPE).
    """
    text, own = config.get_text_config(), text_architecture(config).prepare_inputs_for_generation
    if (getattr(text, "rope_parameters", None) or {}).get("rope_type") != "longrope":
        return None
    switches = own is not GenerationMixin.prepare_inputs_for_generation
    return getattr(text, "original_max_position_embeddings", None) if switches else None


class LavinGenerationMixin(GenerationMixin):
    """What a LaVIN adds to transformers' generation."""

    def create_masks_for_generate(self, config, **kwargs):
        """The masks of a static cache, made as the language model's own class makes them."""
        text = text_architecture(config)
        own = inspect.getattr_static(text, "create_masks_for_generate", staticmethod(create_masks_for_generate))
        return own.__get__(self, text)(config=config.get_text_config(), **kwargs)

    def _supports_default_dynamic_cache(self) -> bool:
        """Whether `generate` makes the cache, rather than the language model one of its own class."""
        return text_architecture(self.config)._supports_default_dynamic_cache()

    @torch.no_grad()
    def generate(self, *args, **kwargs):
        """As [`GenerationMixin.generate`]. The routing table is made once, before the first step."""
        # `pixel_values=None` is no image, as in `forward`; transformers would pass it to the vision tower.
        kwargs = {name: x for name, x in kwargs.items() if x is not None or name not in IMAGE_ARGUMENTS}
        if self.training and any(getattr(module, "gradient_checkpointing", False) for module in self.modules()):
            kwargs["use_cache"] = False  # its blocks drop the cache, and transformers would go on as if it were there
        with self.keep_routing():
            return super().generate(*args, **kwargs)

    @contextlib.contextmanager
    def keep_routing(self):
        """
        Within it the routing table is made once instead of in every forward, as within `generate`: for a decoding loop
        of your own, under `torch.no_grad()`. No weight may change meanwhile, nor autocast or an adapter beside MMA be
        switched.
        """
        model = self.model
        with model.routing.keep():
            with alone(model.routing), torch.no_grad():
                if model.routing.active_layers():  # now: compiled code could not keep it
                    usable_table(model)
            yield

    def _prepare_generated_length(self, generation_config, **kwargs):
        """A prompt beyond the context would be answered with noise, after a long time: transformers only warns."""
        embedded = kwargs["inputs_tensor"] if kwargs["model_input_name"] == "inputs_embeds" else None
        length = kwargs["input_ids_length"] if embedded is None else embedded.shape[1]
        context = context_length(self.config.get_text_config())
        if context is not None and length > context:
            raise ValueError(
                f"The prompt has {length} tokens, and the language model's context holds {context}: shorten the "
                "prompt or leave out earlier turns."
            )
        generation_config._prompt_length = length
        return super()._prepare_generated_length(generation_config, **kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """An answer that goes beyond such a switch is made without a cache, which would hold the other positions."""
        switch, cache = rope_switch(self.config), model_kwargs.get(CACHE)
        if switch is not None and generation_config.max_length > switch:
            start = (int(cache.get_seq_length()) if cache is not None else 0) or generation_config._prompt_length
            if start <= switch:
                model_kwargs.pop(CACHE, None)
                generation_config.use_cache = False
                generation_config.cache_implementation = None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def _prefill(self, input_ids, generation_config, model_kwargs, is_first_iteration=True):
        """Fixes each row's modality from the whole prompt, before it is cut into chunks or down to its new part."""
        cache, images = model_kwargs.get(CACHE), model_kwargs.get("mm_encoder_outputs")
        past = int(cache.get_seq_length()) if cache is not None else 0
        if cache is not None:
            carry_modality(cache)
        # An assistant is asked again and again, and told each time that it is not the first.
        is_first_iteration = is_first_iteration or (past == 0 and bool(images))
        if input_ids is not None and input_ids.numel() > 0:
            is_image = input_ids == self.config.image_token_id
            if past == 0 and model_kwargs.get("inputs_embeds") is None:
                if model_kwargs.get("modality_ids") is None:
                    model_kwargs = {**model_kwargs, "modality_ids": is_image.any(dim=-1).long()}
            elif past and images and images.get("image") is not None and input_ids.shape[1] > past:
                # A second turn on a kept cache: images of the cached part are in it already.
                features = flat_features(images["image"])
                if features.shape[0] == int(is_image.sum()):
                    is_new = torch.arange(is_image.shape[1], device=is_image.device) >= past
                    features = features[is_new.expand_as(is_image)[is_image]]
                images = {"image": BaseModelOutputWithPooling(pooler_output=features)} if len(features) else None
                model_kwargs = {**model_kwargs, "mm_encoder_outputs": images}
        if generation_config.prefill_chunk_size is not None and not CHUNKS_IMAGES and (images or past):
            logger.warning_once("Prefill in chunks of a prompt with images needs transformers 5.23: done at once.")
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = None
        return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)

    def _get_logits_processor(self, *args, **kwargs) -> LogitsProcessorList:
        processors = super()._get_logits_processor(*args, **kwargs)
        if self.config.image_token_id < self.config.text_config.vocab_size:
            # A padded vocabulary holds the image token: it must not be generated.
            device = kwargs.get("device") or self.device
            processors.append(SuppressTokensLogitsProcessor([self.config.image_token_id], device=device))
        return processors

    def _get_candidate_generator(
        self,
        generation_config,
        input_ids,
        inputs_tensor,
        logits_processor,
        model_kwargs,
        assistant_model=None,
        **kwargs,
    ):
        """Drafts hold no image token, and an assistant that knows no images drafts from the text alone."""
        image_token_id = self.config.image_token_id
        text_only = assistant_model is not None and not hasattr(assistant_model.config, "image_token_id")
        if text_only:
            model_kwargs = {key: value for key, value in model_kwargs.items() if key not in IMAGE_ARGUMENTS}
        generator = super()._get_candidate_generator(
            generation_config, input_ids, inputs_tensor, logits_processor, model_kwargs, assistant_model, **kwargs
        )
        if text_only:
            draft = generator.get_candidates

            def get_candidates(input_ids, *args, **kwargs):
                candidates, logits = draft(input_ids.masked_fill(input_ids == image_token_id, 0), *args, **kwargs)
                return torch.cat([input_ids, candidates[:, input_ids.shape[1] :]], dim=1), logits

            generator.get_candidates = get_candidates
        elif generation_config.prompt_lookup_num_tokens is not None:
            generator.vocab_size = max(generator.vocab_size, image_token_id + 1)
            suppress = SuppressTokensLogitsProcessor([image_token_id], device=input_ids.device)
            generator.logits_processor = LogitsProcessorList([*(generator.logits_processor or []), suppress])
        return generator
