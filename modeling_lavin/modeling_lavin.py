"""LaVIN: a frozen vision tower, a frozen language model, and a routing table between them (arXiv 2305.15023)."""

import inspect
from dataclasses import dataclass

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging

from .adapters_lavin import find_blocks
from .configuration_lavin import LavinConfig, check_image_size, patches_per_side, sides
from .fit_lavin import nothing_drawn_on_meta
from .folder_lavin import LavinFolderMixin
from .folding_lavin import LavinFoldingMixin
from .generation_lavin import LavinGenerationMixin, architecture_flags, kept_positions
from .projector_lavin import (
    LavinModalityEmbedding,
    LavinMultiModalProjector,
    LavinTaps,
    draw_own,
    flat_features,
    image_places,
    merge_features,
)
from .routing_lavin import (
    CACHE,
    MMARouting,
    alone,
    carry_modality,
    one_cache,
    routed,
    routing_table,
    row_modality,
)
from .trainable_lavin import LavinTrainingMixin, check_training, unused_features


logger = logging.get_logger(__name__)


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
class LavinImageOutput(BaseModelOutputWithPooling):
    """
    Outputs of [`LavinModel.get_image_features`]: the vision tower's own, and:

    Args:
        pooler_output (`torch.Tensor` of shape `(num_images, num_image_tokens, hidden_size)`):
            The image tokens.
        tapped_states (`torch.Tensor` of shape `(num_images, num_taps, vision_hidden_size)`, *optional*):
            What the taps read, before the projector.
    """

    tapped_states: torch.Tensor | None = None


@dataclass
class LavinCausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    Outputs of a [`LavinForConditionalGeneration`]: a causal language model's, whose cache also holds each row's
    modality, and:

    Args:
        image_hidden_states (`torch.Tensor` of shape `(num_images, num_image_tokens, hidden_size)`, *optional*):
            The image tokens that were put into the sequence.
    """

    image_hidden_states: torch.Tensor | None = None


class LavinPreTrainedModel(LavinFolderMixin, LavinTrainingMixin, PreTrainedModel):
    config: LavinConfig
    config_class = LavinConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["LavinMultiModalProjector", "LavinModalityEmbedding"]
    _skip_keys_device_placement = [CACHE]
    _keep_in_fp32_modules_strict = ["multi_modal_projector", "modality_embedding"]
    # Quantisation leaves these alone; it matches from the start of a name.
    _keep_in_fp32_modules = [r"(?:model\.)?multi_modal_projector"]
    _keys_to_ignore_on_load_missing = [
        r"multi_modal_projector\..*",
        r"modality_embedding\..*",
        r"vision_tower\.(vision_model\.)?(pooler|head)\.",  # never read, and a classifier's checkpoint has none
    ]
    # Of the class; of a model what its towers can do.
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config: LavinConfig, *args, **kwargs):
        vars(self).update(architecture_flags(config))  # read by what follows
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module):
        """The projector and an N(0, 1) modality embedding: from own generators, so that all ranks agree."""
        # By leaves: for code outside transformers, a module without weights of its own never gets here.
        if not draw_own(module):
            super()._init_weights(module)

    @classmethod
    def is_custom_code(cls) -> bool:
        """Whether missing weights are set module by module only, which passes over what CLIP sets as a whole."""
        return False  # `_init_weights` here and of the towers leave loaded weights alone by themselves

    def resize_token_embeddings(self, *args, **kwargs):
        """As in transformers. A base that was resized is saved whole, beside its adapter."""
        if any(
            isinstance(m, ModulesToSaveWrapper) for m in (self.get_input_embeddings(), self.get_output_embeddings())
        ):
            raise ValueError(
                "An adapter trains the embedding or the head (`modules_to_save`): resize before it is added."
            )
        before, image = self.config.text_config.vocab_size, self.config.image_token_id
        embedding = super().resize_token_embeddings(*args, **kwargs)
        if before <= image < embedding.num_embeddings:
            logger.warning(
                f"Row {image} is the image token's, and never generated. Add tokens to the tokenizer of LaVIN's own "
                "processor, which counts it: in another one the first new token would have this id."
            )
        return embedding


class LavinModel(LavinPreTrainedModel):
    """
    The two towers and what lies between them, without a language modelling head.

    A row's modality is 1 when the row holds an image, 0 otherwise. It is fixed at prefill and travels with the cache.
    """

    def __init__(self, config: LavinConfig):
        super().__init__(config)
        with nothing_drawn_on_meta():
            self.vision_tower = AutoModel.from_config(config.vision_config)
            self.multi_modal_projector = LavinMultiModalProjector(config)
            self.modality_embedding = LavinModalityEmbedding(2, config.text_config.hidden_size)
            self.language_model = AutoModel.from_config(config.text_config)
        self.has_class_token = any(
            "class_embedding" in name or "cls_token" in name for name, _ in self.vision_tower.named_parameters()
        )
        self.can_interpolate = "interpolate_pos_encoding" in inspect.signature(self.vision_tower.forward).parameters
        self.taps = LavinTaps()
        _, blocks = find_blocks(self.vision_tower)
        for layer in config.vision_feature_layers:
            blocks[layer - 1].register_forward_hook(self.taps)
        self.routing = MMARouting()
        self.last_finite = None  # whether the last training forward was: a tensor, read when something is saved
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.FloatTensor, **kwargs) -> LavinImageOutput:
        """
        Image tokens of images: the class token after each tapped block (of a tower without one, such as SigLIP, the
        mean of its patch states), or the patches of the tower's last hidden state, or both, through the projector.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_images, channels, height, width)`):
                Preprocessed images, over all rows of the batch in their order. Of the tower's own size, or squares of
                whole patches, for which its positions are interpolated.
            output_hidden_states, output_attentions (`bool`, *optional*):
                Whether the vision tower's own are returned as well.

        Returns:
            [`LavinImageOutput`]: the image tokens are `pooler_output`.

        Raises:
            `ValueError`: if the tower cannot read images of that size, or `pool_size` does not divide their patches.
        """
        config = self.config
        height, width = pixel_values.shape[-2:]
        check_image_size(height, width, config.vision_config)
        interpolate = self.can_interpolate and (height, width) != sides(config.vision_config.image_size)
        dtype = next(p.dtype for p in self.vision_tower.parameters() if p.dtype.is_floating_point)
        asked = {name: kwargs.get(name) for name in ("output_hidden_states", "output_attentions")}
        arguments = {name: value for name, value in asked.items() if value is not None}
        if interpolate:
            arguments["interpolate_pos_encoding"] = True
        with alone(self.routing):
            self.taps.states = []
            try:
                outputs = self.vision_tower(pixel_values.to(dtype), return_dict=True, **arguments)
                # Under `device_map` the blocks may be on several devices.
                states = [state.to(outputs.last_hidden_state.device) for state in self.taps.states]
            finally:
                self.taps.states = None
        taps = patches = None
        if config.reads_taps:
            taps = torch.stack([state[:, 0] if self.has_class_token else state.mean(dim=1) for state in states], dim=1)
        if config.reads_pool:
            count = patches_per_side(height, width, config.vision_config) ** 2
            patches = outputs.last_hidden_state[:, -count:]  # behind the class token
            if patches.shape[1] != count:
                raise ValueError(
                    f"The pool-adapter needs a state for each of {count} patches, and the vision tower "
                    f"({type(self.vision_tower).__name__}) gives {patches.shape[1]}: choose `projector_type` 'taps'."
                )
        return LavinImageOutput(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=self.multi_modal_projector(taps, patches, config.pool_size),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            tapped_states=taps,
        )

    def routing_table(self) -> torch.Tensor:
        """
        Expert weights of every adapted module of the language model, `(layers, 2 modalities, 2 experts)`: one forward
        of the language model on the two modality embeddings, each a sequence of length one.

        Raises:
            `ValueError`: if no MMA adapter is active there.
        """
        return routing_table(self)

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
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LavinModelOutputWithPast:
        r"""
        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Token ids; `config.image_token_id` marks the places of image tokens.
            pixel_values (`torch.FloatTensor` of shape `(num_images, channels, height, width)`, *optional*):
                The images of all rows, in order. Rows without one simply have no image tokens.
            inputs_embeds (`torch.FloatTensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
                Instead of `input_ids`; images are then already in it, unless the embedding has a row for the image
                token, which marks their places then.
            modality_ids (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                States each row's modality (0 text, 1 with image) where the ids do not show it: with `inputs_embeds`,
                or when a prompt with an image is prefilled in chunks.
            mm_encoder_outputs (`dict`, *optional*):
                `{"image": get_image_features(...)}`, instead of `pixel_values`.
            cache (`Cache`, *optional*):
                `past_key_values` by the name it has since transformers 5.24. Either name is taken with any version.

        Raises:
            `ValueError`: if image tokens and image features do not match; if an image comes after a cached prefix
                without one; if every weight is frozen in training.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
        if pixel_values is not None and mm_encoder_outputs:
            raise ValueError("You cannot specify both pixel_values and mm_encoder_outputs at the same time")
        check_training(self)
        cache = one_cache(cache, past_key_values)

        inputs_embeds, has_image, images = self._embed(
            input_ids, inputs_embeds, pixel_values, (mm_encoder_outputs or {}).get("image"), cache
        )
        modality_ids = row_modality(modality_ids, has_image, cache, inputs_embeds.shape[0], inputs_embeds.device)
        with routed(self, modality_ids, inputs_embeds.dtype):
            outputs = self.language_model(
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                **{CACHE: cache},
                **kwargs,
            )
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self.last_finite = outputs.last_hidden_state.detach().isfinite().all()
        cache = getattr(outputs, CACHE, cache)  # some decoders only write into it
        if cache is not None:
            if not torch.compiler.is_compiling():
                carry_modality(cache)
            cache.modality_ids = modality_ids
        return LavinModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            hidden_states=outputs.hidden_states,
            attentions=getattr(outputs, "attentions", None),  # a Mamba's has none
            image_hidden_states=None if images is None else images.pooler_output,
            **{CACHE: cache},
        )

    def _embed(self, input_ids, inputs_embeds, pixel_values, images, cache):
        """Text and images as one sequence, which rows have an image (if that is to be seen), and the images."""
        if images is None and pixel_values is not None and pixel_values.shape[0] > 0:
            images = self.get_image_features(pixel_values, return_dict=True)
        features = None if images is None else flat_features(images)
        unused = unused_features(self, cache) if images is None else None
        has_image = None
        if inputs_embeds is None:
            is_image = input_ids == self.config.image_token_id
            # The image token needs no row in the embedding: any row serves as its place.
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
            inputs_embeds = merge_features(inputs_embeds, is_image, features, self.config)
            has_image = None if features is None else is_image.any(dim=-1)
        elif features is not None:
            is_image = image_places(self, inputs_embeds)
            inputs_embeds = merge_features(inputs_embeds, is_image, features, self.config)
            has_image = is_image.any(dim=-1)
        if unused is not None:
            inputs_embeds = inputs_embeds + (unused.sum() * 0).to(inputs_embeds)
        return inputs_embeds, has_image, images


class LavinForConditionalGeneration(LavinFoldingMixin, LavinPreTrainedModel, LavinGenerationMixin):
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

    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: LavinConfig):
        super().__init__(config)
        text = config.get_text_config()
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
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> LavinCausalLMOutputWithPast:
        r"""
        The arguments of [`LavinModel.forward`], and:

        Args:
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Ids to predict, -100 where there is nothing to learn. The loss is over those whose prediction
                `logits_to_keep` keeps.
            logits_to_keep (`int` or `torch.Tensor`, *optional*, defaults to 0):
                Compute logits for the last so many positions only; 0 for all. A tensor names the positions, of every
                row `(num_positions,)` or of each `(batch_size, num_positions)`; a mask `(batch_size, sequence_length)`
                gives `(num_true, vocab_size)`.
        """
        cache = one_cache(cache, past_key_values)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            modality_ids=modality_ids,
            mm_encoder_outputs=mm_encoder_outputs,
            return_dict=True,
            **kwargs,
        )
        hidden_states = kept_positions(outputs.last_hidden_state, logits_to_keep)
        logits = self.lm_head(hidden_states)
        loss = None
        if labels is not None:
            labels = labels.masked_fill(labels == self.config.image_token_id, -100)  # it has no row in the head
            shifted = kwargs.pop("shift_labels", None)
            if shifted is None and (torch.is_tensor(logits_to_keep) or logits.shape[:2] != labels.shape):
                shifted = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
            if shifted is not None:
                targets = kept_positions(shifted.unsqueeze(-1), logits_to_keep).squeeze(-1)
                kwargs["shift_labels"] = targets.contiguous()
            loss = self.loss_function(logits, labels, vocab_size=self.config.text_config.vocab_size, **kwargs)
        return LavinCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            **{CACHE: getattr(outputs, CACHE)},
        )


__all__ = ["LavinForConditionalGeneration", "LavinModel", "LavinPreTrainedModel"]
