"""LaVIN: a frozen vision tower, a frozen language model, and a routing table between them (arXiv 2305.15023)."""

import functools
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import LogitsProcessorList, SuppressTokensLogitsProcessor
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.utils import can_return_tuple, logging

from .configuration_lavin import LavinConfig
from .folder_lavin import LavinFolderMixin
from .folding_lavin import fold_modality
from .tuner_lavin import MMARouting


logger = logging.get_logger(__name__)

FROZEN = (
    "Every weight of this LaVIN is frozen, so training it would change nothing. Load it with `mma={}` "
    "(`from_pretrained(..., mma={})`; in a YAML for `trl sft`: `model_init_kwargs: {mma: {}}`) to train its adapter."
)


@dataclass
class LavinModelOutputWithPast(BaseModelOutputWithPast):
    """
    Outputs of a [`LavinModel`].

    Args:
        image_hidden_states (`torch.Tensor` of shape `(num_images, num_image_tokens, hidden_size)`, *optional*):
            The image tokens that were put into the sequence.
    """

    image_hidden_states: torch.Tensor | None = None


@dataclass
class LavinCausalLMOutputWithPast(ModelOutput):
    """
    Outputs of a [`LavinForConditionalGeneration`].

    Args:
        loss (`torch.Tensor` of shape `(1,)`, *optional*, returned when `labels` is given):
            Next-token loss, a mean over the labelled tokens.
        logits (`torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`):
            Scores before the softmax.
        past_key_values (`Cache`, *optional*):
            Keys and values, and each row's modality.
        image_hidden_states (`torch.Tensor` of shape `(num_images, num_image_tokens, hidden_size)`, *optional*):
            The image tokens that were put into the sequence.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor] | None = None
    attentions: tuple[torch.Tensor] | None = None
    image_hidden_states: torch.Tensor | None = None


class LavinMultiModalProjector(nn.Module):
    """Linear, SiLU, Linear: from the vision tower's width to the language model's (paper, eq. 1)."""

    def __init__(self, config: LavinConfig):
        super().__init__()
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, config.projector_hidden_size)
        self.act = nn.SiLU()
        self.linear_2 = nn.Linear(config.projector_hidden_size, config.text_config.hidden_size)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        return self.linear_2(self.act(self.linear_1(image_features.to(self.linear_1.weight.dtype))))


class LavinModalityEmbedding(nn.Embedding):
    """The modality token: row 0 for text-only input, row 1 for text with images (paper, section 3.2)."""


class LavinPreTrainedModel(LavinFolderMixin, PreTrainedModel):
    config: LavinConfig
    config_class = LavinConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["LavinMultiModalProjector", "LavinModalityEmbedding"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["multi_modal_projector", "modality_embedding"]
    _keys_to_ignore_on_load_missing = [r"multi_modal_projector\..*", r"modality_embedding\..*"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module):
        """Method 2 of LaVIN's initialisation: Xavier-uniform projector, N(0, 1) modality; drawn apart from torch's RNG."""
        if isinstance(module, LavinMultiModalProjector):
            generator = torch.Generator().manual_seed(0)
            for linear in (module.linear_1, module.linear_2):
                bound = math.sqrt(6 / (linear.in_features + linear.out_features))
                shape = (linear.out_features, linear.in_features)
                init.copy_(linear.weight, torch.empty(shape).uniform_(-bound, bound, generator=generator))
                init.zeros_(linear.bias)
        elif isinstance(module, LavinModalityEmbedding):
            generator = torch.Generator().manual_seed(1)
            shape = (module.num_embeddings, module.embedding_dim)
            init.copy_(module.weight, torch.empty(shape).normal_(generator=generator))
        else:
            super()._init_weights(module)

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


def checkpoint_routed(routing: MMARouting, checkpoint_function, function, *args, **kwargs):
    """Checkpoints a block so that its recomputation sees the routing of its own forward, not of a later one."""
    if routing.collected is not None:  # the routing pass: its weights leave the block, so it is never recomputed
        return function(*args, **kwargs)
    weights = routing.weights

    def run(*args, **kwargs):
        current, routing.weights = routing.weights, weights
        try:
            return function(*args, **kwargs)
        finally:
            routing.weights = current

    return checkpoint_function(run, *args, **kwargs)


class LavinModel(LavinPreTrainedModel):
    """
    The two towers and what lies between them, without a language modelling head.

    A row's modality is 1 when the row holds an image, 0 otherwise. It is fixed at prefill and travels with the cache.
    """

    def __init__(self, config: LavinConfig):
        super().__init__(config)
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.multi_modal_projector = LavinMultiModalProjector(config)
        self.modality_embedding = LavinModalityEmbedding(2, config.text_config.hidden_size)
        self.language_model = AutoModel.from_config(config.text_config)
        self.has_class_token = any(
            "class_embedding" in name or "cls_token" in name for name, _ in self.vision_tower.named_parameters()
        )
        self.routing = MMARouting()
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    # What is kept between forwards falls with anything that may change weights without an in-place operation.
    def train(self, mode: bool = True):
        self.routing.kept = None
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        self.routing.kept = None
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args, **kwargs):
        self.routing.kept = None
        return super()._load_from_state_dict(*args, **kwargs)

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.FloatTensor, **kwargs) -> BaseModelOutputWithPooling:
        """
        Image tokens of images: the class token after each tapped block (of a tower without one, such as SigLIP, the
        mean of its patch states), through the projector.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_images, channels, height, width)`):
                Preprocessed images, over all rows of the batch in their order.

        Returns:
            `BaseModelOutputWithPooling`: `pooler_output` holds the image tokens,
            `(num_images, num_image_tokens, hidden_size)`; `hidden_states` the tapped states before the projector.
        """
        self._keep()
        dtype = next(p.dtype for p in self.vision_tower.parameters() if p.dtype.is_floating_point)
        states = self.vision_tower(pixel_values.to(dtype), output_hidden_states=True, return_dict=True)
        taps = [states.hidden_states[layer] for layer in self.config.vision_feature_layers]
        taps = torch.stack([tap[:, 0] if self.has_class_token else tap.mean(dim=1) for tap in taps], dim=1)
        return BaseModelOutputWithPooling(
            last_hidden_state=states.last_hidden_state,
            pooler_output=self.multi_modal_projector(taps),
            hidden_states=(taps,),
        )

    def routing_table(self) -> torch.Tensor:
        """
        Expert weights of every adapted module of the language model, `(layers, 2 modalities, 2 experts)`: one forward
        of the language model on the two modality embeddings, each a sequence of length one.
        """
        routing = self.routing
        routing.collected = {}
        try:
            embeds = (
                self.modality_embedding.weight if not hasattr(self.modality_embedding, "modules_to_save") else None
            )
            ids = torch.arange(2, device=self.get_input_embeddings().weight.device)
            embeds = self.modality_embedding(ids)
            self.language_model(
                inputs_embeds=embeds.unsqueeze(1).to(self._compute_dtype()),
                position_ids=torch.zeros_like(ids[:1]).unsqueeze(0),
                use_cache=False,
            )
            device = embeds.device
            return torch.stack([routing.collected[layer.index].to(device) for layer in routing.active_layers()])
        finally:
            routing.collected = None

    def _compute_dtype(self) -> torch.dtype:
        return self.get_input_embeddings().weight.dtype

    def _keep(self):
        """Drops what was kept if gradients are on or any adapter weight changed, and keeps anew."""
        routing = self.routing
        if torch.compiler.is_compiling():
            return
        if torch.is_grad_enabled():
            routing.kept = None
            return
        layers = (
            [module for module in self.modules() if hasattr(module, "adapter_down")] if routing.kept is None else None
        )
        layers = layers if layers is not None else routing.kept["layers"]
        tensors = [p for layer in layers for p in layer.parameters() if p.dtype == torch.float32]
        tensors += list(self.modality_embedding.parameters())
        key = [(p.data_ptr(), p._version) for p in tensors] + [(layer.active, layer.active_name) for layer in layers]
        if routing.kept is None or routing.kept["key"] != key:
            routing.kept = {"key": key, "layers": layers, "up": {}, "table": None}

    def _table(self) -> torch.Tensor:
        kept = self.routing.kept
        if kept is None or torch.is_grad_enabled():
            return self.routing_table()
        if kept["table"] is None:
            with torch.inference_mode(False), torch.no_grad():
                kept["table"] = self.routing_table()
        return kept["table"]

    def _modality(self, has_image, batch_size, modality_ids, past_key_values, device):
        """Each row's modality, `(batch_size,)`: what the caller states, the cache's, or whether the row has an image."""
        past = past_key_values is not None and getattr(past_key_values, "modality_ids", None) is not None
        cached = past_key_values.modality_ids if past and past_key_values.get_seq_length() > 0 else None
        if modality_ids is not None:
            return modality_ids.to(device=device, dtype=torch.long)
        if cached is not None:
            if cached.shape[0] != batch_size:
                raise ValueError(f"The cache holds {cached.shape[0]} rows, the input {batch_size}.")
            if has_image is not None and bool((has_image & (cached == 0)).any()):
                raise ValueError(
                    "An image after a cached prefix without one: the prefix was computed as text only and cannot be "
                    "made right afterwards. Start again without `past_key_values`."
                )
            return cached
        if has_image is not None:
            return has_image.long()
        return torch.zeros(batch_size, dtype=torch.long, device=device)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        modality_ids: torch.LongTensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs,
    ) -> LavinModelOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token ids; `config.image_token_id` marks the places of image tokens.
            pixel_values (`torch.FloatTensor` of shape `(num_images, channels, height, width)`, *optional*):
                The images of all rows, in order. Rows without one simply have no image tokens.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Instead of `input_ids`; images are then already in it.
            modality_ids (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                States each row's modality (0 text, 1 with image) where the ids do not show it: with `inputs_embeds`,
                or when a prompt with an image is prefilled in chunks.
            mm_encoder_outputs (`dict`, *optional*):
                `{"image": get_image_features(...)}`, instead of `pixel_values`.

        Raises:
            `ValueError`: if image tokens and image features do not match; if an image comes after a cached prefix
                without one; if every weight is frozen in training.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if pixel_values is not None and mm_encoder_outputs:
            raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs at the same time")
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            if not any(parameter.requires_grad for parameter in self.parameters()):
                raise ValueError(FROZEN)
        self._keep()

        images = (mm_encoder_outputs or {}).get("image")
        if images is None and pixel_values is not None and pixel_values.shape[0] > 0:
            images = self.get_image_features(pixel_values, return_dict=True)
        features, has_image = None, None
        if images is not None:
            features = images.pooler_output
            features = features if isinstance(features, torch.Tensor) else torch.cat(list(features))
        if inputs_embeds is None:
            is_image = input_ids == self.config.image_token_id
            # The image token needs no row in the embedding: any row serves as its place.
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
            has_past = past_key_values is not None and past_key_values.get_seq_length() > 0
            if features is not None or not has_past:
                inputs_embeds = self._merge(inputs_embeds, is_image, features)
                has_image = is_image.any(dim=-1)
        elif features is not None:
            raise ValueError(
                "With `inputs_embeds` the image tokens must already be in it: pass no images, but "
                "`modality_ids=1` for the rows that hold one."
            )
        inputs_embeds = self._touch_vision_tower(inputs_embeds, features)

        modality_ids = self._modality(
            has_image, inputs_embeds.shape[0], modality_ids, past_key_values, inputs_embeds.device
        )
        layers = self.routing.active_layers()
        if layers:
            weights = self._table()[:, modality_ids].unbind(0)
            self.routing.weights = {layer.index: weight for layer, weight in zip(layers, weights, strict=True)}
        outputs = self.language_model(
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        self.routing.weights = None
        if outputs.past_key_values is not None:
            remember_modality(outputs.past_key_values, modality_ids)
        return LavinModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=features,
        )

    def _merge(self, inputs_embeds, is_image, features):
        """Puts the image tokens at their places."""
        if features is None:
            if not torch.compiler.is_compiling() and bool(is_image.any()):
                raise ValueError(
                    f"Image features and image tokens do not match, tokens: {int(is_image.sum())}, features: 0"
                )
            return inputs_embeds
        features = features.reshape(-1, features.shape[-1])
        if not torch.compiler.is_compiling() and int(is_image.sum()) != features.shape[0]:
            raise ValueError(
                f"Image features and image tokens do not match, tokens: {int(is_image.sum())}, "
                f"features: {features.shape[0]}"
            )
        features = features.to(inputs_embeds.device, inputs_embeds.dtype)
        return inputs_embeds.masked_scatter(is_image.unsqueeze(-1), features)

    def _touch_vision_tower(self, inputs_embeds, features):
        """In distributed training every rank must run the same modules (ZeRO hangs otherwise), image or not."""
        if features is not None or not (self.training and torch.is_grad_enabled()):
            return inputs_embeds
        if not torch.distributed.is_available() or not torch.distributed.is_initialized():
            return inputs_embeds
        if torch.distributed.get_world_size() == 1:
            return inputs_embeds
        vision = self.config.vision_config
        size = vision.image_size
        zero = inputs_embeds.new_zeros(1, getattr(vision, "num_channels", 3), size, size)
        features = self.get_image_features(zero, return_dict=True).pooler_output
        return inputs_embeds + (features.sum() * 0).to(inputs_embeds)


class ModalityCacheMixin:
    """A cache that also carries `modality_ids`, which follow its rows."""

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        self.modality_ids = self.modality_ids[beam_idx.to(self.modality_ids.device)]

    def batch_repeat_interleave(self, repeats):
        super().batch_repeat_interleave(repeats)
        self.modality_ids = self.modality_ids.repeat_interleave(repeats, dim=0)

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self.modality_ids = self.modality_ids[indices]


@functools.cache
def _modality_cache_class(cache_class):
    return type(cache_class.__name__, (ModalityCacheMixin, cache_class), {})


def remember_modality(cache: Cache, modality_ids: torch.Tensor):
    """Keeps each row's modality in the cache, so that any later forward over it routes alike."""
    cache.modality_ids = modality_ids
    if not torch.compiler.is_compiling() and not isinstance(cache, ModalityCacheMixin):
        cache.__class__ = _modality_cache_class(type(cache))


class LavinForConditionalGeneration(LavinPreTrainedModel, GenerationMixin):
    """
    A [`LavinModel`] with the base language model's head. Text-only logits with no adapter attached are bit for bit
    the base's.

    Example:

    ```python
    >>> from lavin import LavinForConditionalGeneration
    >>> model = LavinForConditionalGeneration.from_vision_text_pretrained(
    ...     "openai/clip-vit-large-patch14", "huggyllama/llama-7b"
    ... )  # doctest: +SKIP
    ```
    """

    def __init__(self, config: LavinConfig):
        super().__init__(config)
        text = config.get_text_config()
        for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if getattr(text, name, None) not in (None, 1, 1.0):
                raise ValueError(
                    f"{text.model_type} changes its logits after the head (`{name}`); LaVIN cannot do so."
                )
        self.model = LavinModel(config)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        embedding = self.model.get_input_embeddings()
        name = next(name for name, module in self.model.named_modules() if module is embedding)
        self._tied_weights_keys = {"lm_head.weight": f"model.{name}.weight"}
        self.post_init()

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def get_image_features(self, pixel_values: torch.FloatTensor, **kwargs):
        return self.model.get_image_features(pixel_values, **kwargs)

    def routing_table(self) -> torch.Tensor:
        """See [`LavinModel.routing_table`]."""
        return self.model.routing_table()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        modality_ids: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs,
    ) -> LavinCausalLMOutputWithPast:
        r"""
        The arguments of [`LavinModel.forward`], and:

        Args:
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Ids to predict, -100 where there is nothing to learn.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Compute logits for the last so many positions only; 0 for all.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            modality_ids=modality_ids,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.text_config.vocab_size, **kwargs)
        return LavinCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    def _prefill(self, input_ids, generation_config, model_kwargs, is_first_iteration=True):
        """Fixes each row's modality from the whole prompt, before it is cut into chunks or down to its new part."""
        cache, images = model_kwargs.get("past_key_values"), model_kwargs.get("mm_encoder_outputs")
        past = int(cache.get_seq_length()) if cache is not None else 0
        if input_ids is not None and input_ids.numel() > 0 and model_kwargs.get("modality_ids") is None:
            is_image = input_ids == self.config.image_token_id
            if past == 0 and model_kwargs.get("inputs_embeds") is None:
                model_kwargs = {**model_kwargs, "modality_ids": is_image.any(dim=-1).long()}
            elif past and images and images.get("image") is not None and input_ids.shape[1] > past:
                # A second turn on a kept cache: the images of the cached part are in it already.
                features = images["image"].pooler_output
                features = features if isinstance(features, torch.Tensor) else torch.cat(list(features))
                features = features.reshape(-1, features.shape[-1])
                order = (is_image.flatten().cumsum(0) - 1).view_as(is_image)[:, past:]
                new = features[order[is_image[:, past:]]] if features.shape[0] == int(is_image.sum()) else features
                images = {"image": BaseModelOutputWithPooling(pooler_output=new)} if new.shape[0] else None
                model_kwargs = {**model_kwargs, "mm_encoder_outputs": images}
        return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)

    def _get_logits_processor(self, *args, **kwargs) -> LogitsProcessorList:
        processors = super()._get_logits_processor(*args, **kwargs)
        if self.config.image_token_id < self.config.text_config.vocab_size:
            # A padded vocabulary holds the image token: it must not be generated.
            device = kwargs.get("device") or self.device
            processors.append(SuppressTokensLogitsProcessor([self.config.image_token_id], device=device))
        return processors

    def merge_modality(self, modality: str) -> PreTrainedModel:
        """
        Folds the language model's active adapter into a plain language model for one modality: with U = s (w0 B + w1 D),
        `W' = W (I + U A)`, `b' = b + W (U a0 + s (w0 b0 + w1 d0))` for each map that reads an adapted input.

        Args:
            modality (`str`):
                `"text"`, or `"image"` for prompts that hold an image (as `inputs_embeds` with the image tokens in it).

        Returns:
            `PreTrainedModel`: the text architecture's own causal language model, without any adapter. A Llama has
            `attention_bias=True`.

        Raises:
            `ValueError`: if the architecture's maps cannot take a bias, the base is quantised, or no adapter is active.
        """
        return fold_modality(self, modality)


__all__ = ["LavinForConditionalGeneration", "LavinModel", "LavinPreTrainedModel"]
