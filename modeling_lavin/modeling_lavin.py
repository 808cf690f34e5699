"""LaVIN: a frozen vision tower, a frozen language model, and a routing table between them (arXiv 2305.15023)."""

import contextlib
import functools
import inspect
from dataclasses import dataclass

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple, logging

from .cache_lavin import CACHE, cached_modality, carry_modality
from .configuration_lavin import LavinConfig, check_image_size, patches_per_side, sides
from .folder_lavin import LavinFolderMixin
from .folding_lavin import fold_both, fold_modality, rows_of
from .generation_lavin import LavinGenerationMixin, flat_features, text_architecture
from .projector_lavin import LavinMultiModalProjector, draw_projector
from .tuner_lavin import FOLDED, MMARouting, alone, computing_device, find_blocks


logger = logging.get_logger(__name__)

FROZEN = (
    "Every weight of this LaVIN is frozen, so training it would change nothing. Load it with `mma={}` "
    "(`from_pretrained(..., mma={})`; in a YAML for `trl sft`: `model_init_kwargs: {mma: {}}`) to train its adapter, "
    "or with `trainable=[regex, ...]` in its place to train parts of the base."
)
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
TOWER_OUTPUTS = ("output_hidden_states", "output_attentions")
IMAGE_AFTER_TEXT = (
    "An image after a cached prefix without one: the prefix was computed as text only and cannot be made right "
    f"afterwards. Start again without `{CACHE}`."
)
NO_DATA_PARALLEL = (
    "LaVIN does not run under `torch.nn.DataParallel`, which shares one routing table between threads. Start one "
    "process per GPU (`accelerate launch`, `torchrun`), or show one GPU only (`CUDA_VISIBLE_DEVICES=0`)."
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


class LavinModalityEmbedding(nn.Embedding):
    """The modality token: row 0 for text-only input, row 1 for text with images (paper, section 3.2)."""


class LavinTaps:
    """A forward hook of the tapped blocks, that notes what leaves them while `states` is a list."""

    def __init__(self):
        self.states = None

    def __call__(self, module, args, output):
        if self.states is not None:  # not in a recomputation by gradient checkpointing
            self.states.append(output[0] if isinstance(output, tuple) else output)


class LavinPreTrainedModel(LavinFolderMixin, PreTrainedModel):
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
        if draw_projector(module):
            return
        if isinstance(module, LavinModalityEmbedding):
            generator = torch.Generator().manual_seed(0)
            shape = (module.num_embeddings, module.embedding_dim)
            init.copy_(module.weight, torch.empty(shape).normal_(generator=generator))
        else:
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


def architecture_flags(config: LavinConfig) -> dict:
    """What a LaVIN of these two towers can do, as their own classes say."""
    text, vision = text_architecture(config), AutoModel._model_mapping[type(config.vision_config)]
    flags = {name: getattr(text, name) for name in TEXT_FLAGS if hasattr(text, name)}
    return {**flags, **{name: getattr(text, name) and getattr(vision, name) for name in ATTENTION_FLAGS}}


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


def nothing_drawn_on_meta():
    """A context for making modules: where they get no memory, drawing their weights takes its time for nothing."""
    return init.no_init_weights() if torch.empty(0).device.type == "meta" else contextlib.nullcontext()


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
        arguments = {name: kwargs[name] for name in TOWER_OUTPUTS if kwargs.get(name) is not None}
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
        embedding = self.get_input_embeddings()
        embedding = getattr(embedding, "original_module", embedding)  # a trained one may be wider than what follows
        ids = torch.arange(2, device=computing_device(embedding))
        routing = self.routing
        if not routing.active_layers():
            raise ValueError("No MMA adapter is active in the language model: there is no routing.")
        with alone(routing):
            routing.collected = {}
            try:
                self.language_model(
                    inputs_embeds=self.modality_embedding(ids).unsqueeze(1).to(ids.device, embedding.weight.dtype),
                    position_ids=torch.zeros_like(ids[:1]).unsqueeze(0),
                    use_cache=False,
                )
                # Under `device_map` the layers may be on several devices.
                return torch.stack([routing.collected[layer.key].to(ids.device) for layer in routing.active_layers()])
            finally:
                routing.collected = None

    def _table(self) -> torch.Tensor:
        kept = self.routing.usable()
        if kept is None:
            return self.routing_table()
        if kept.table is None:
            kept.table = self.routing_table()
        return kept.table

    def _row_modality(self, modality_ids, has_image, cache, batch_size, device):
        """Each row's modality, `(batch_size,)`: the cache's, or what the caller states, or whether it has an image."""
        cached = cached_modality(cache, batch_size, device)
        stated = modality_ids if modality_ids is not None else has_image
        if stated is not None and tuple(stated.shape) != (batch_size,):
            raise ValueError(
                f"`modality_ids` must be of shape ({batch_size},), one per row; got {tuple(stated.shape)}."
            )
        if stated is None:
            return torch.zeros(batch_size, dtype=torch.long, device=device) if cached is None else cached
        stated = stated.to(device, torch.long)
        if cached is None:
            return stated
        if not torch.compiler.is_compiling() and bool((stated > cached).any()):
            raise ValueError(IMAGE_AFTER_TEXT)
        return cached

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
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            if not any(parameter.requires_grad for parameter in self.parameters()):
                raise ValueError(FROZEN)
        if getattr(self, "_is_replica", False):
            raise ValueError(NO_DATA_PARALLEL)
        cache = one_cache(cache, past_key_values)

        images = (mm_encoder_outputs or {}).get("image")
        if images is None and pixel_values is not None and pixel_values.shape[0] > 0:
            images = self.get_image_features(pixel_values, return_dict=True)
        features = None if images is None else flat_features(images)
        unused = self._unused_features(cache) if images is None else None
        has_image = None
        if inputs_embeds is None:
            is_image = input_ids == self.config.image_token_id
            # The image token needs no row in the embedding: any row serves as its place.
            inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
            inputs_embeds = self._merge(inputs_embeds, is_image, features)
            has_image = None if features is None else is_image.any(dim=-1)
        elif features is not None:
            is_image = self._image_places(inputs_embeds)
            inputs_embeds = self._merge(inputs_embeds, is_image, features)
            has_image = is_image.any(dim=-1)
        if unused is not None:
            inputs_embeds = inputs_embeds + (unused.sum() * 0).to(inputs_embeds)

        batch_size, device = inputs_embeds.shape[0], inputs_embeds.device
        modality_ids = self._row_modality(modality_ids, has_image, cache, batch_size, device)
        routing = self.routing
        if routing.folded and self.training:
            raise ValueError(FOLDED)
        with alone(routing):
            if layers := routing.active_layers():
                weights = self._table()[:, modality_ids].unbind(0)
                routing.weights = {layer.key: weight for layer, weight in zip(layers, weights, strict=True)}
            if routing.folded:
                routing.rows = rows_of(modality_ids, inputs_embeds.dtype)
            try:
                outputs = self.language_model(
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    inputs_embeds=inputs_embeds,
                    **{CACHE: cache},
                    **kwargs,
                )
            finally:
                routing.weights = routing.rows = None
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

    def _image_places(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """Where embedded text holds the image token, `(batch, length)`."""
        embedding = self.get_input_embeddings()
        if self.config.image_token_id >= embedding.num_embeddings:
            raise ValueError(
                "With `inputs_embeds` the image tokens must already be in it, as the image token has no row in the "
                "embedding: pass no images, but `modality_ids=1` for the rows that hold one."
            )
        token = embedding(torch.tensor(self.config.image_token_id, device=inputs_embeds.device))
        return (inputs_embeds == token.to(inputs_embeds)).all(dim=-1)

    def _merge(self, inputs_embeds, is_image, features):
        """Puts the image tokens at their places."""
        if not torch.compiler.is_compiling():
            tokens, given = int(is_image.sum()), 0 if features is None else features.shape[0]
            if tokens != given:
                raise ValueError(self._mismatch(tokens, given))
        if features is None:
            return inputs_embeds
        return inputs_embeds.masked_scatter(is_image.unsqueeze(-1), features.to(inputs_embeds))

    def _mismatch(self, tokens: int, features: int) -> str:
        """What to do where the ids hold another number of image tokens than the images give."""
        message, each = f"Image features and image tokens do not match, tokens: {tokens}, features: {features}", 0
        if images := features // self.config.num_image_tokens:
            each = tokens // images if tokens % images == 0 else 0
        if each in (0, self.config.num_image_tokens):
            return message
        return (
            f"{message}. There are {each} tokens for each image, and this model (`projector_type` "
            f"{self.config.projector_type!r}) makes {self.config.num_image_tokens}: its processor must agree, "
            "`processor.num_image_tokens = model.config.num_image_tokens`."
        )

    def _unused_features(self, cache) -> torch.Tensor | None:
        """
        For training on a batch without images: something of all that is trained on the way of an image, so that it
        gets a gradient of zeros. With none at all AdamW would pass it over instead of following its momentum, and a
        run would depend on how its rows are laid out.

        In distributed training every rank must run the same modules in the same order as well (ZeRO hangs or crashes
        otherwise; ZeRO-3 without gradients too, in evaluation or for a reference): a rank without an image runs the
        vision tower on an empty one, before anything else. None elsewhere.
        """
        trains = self.training and torch.is_grad_enabled()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            first = next(self.vision_tower.parameters())
            alike = trains or (hasattr(first, "ds_id") and (cache is None or cache.get_seq_length() == 0))
            if alike and torch.distributed.get_world_size() > 1:
                image = torch.zeros((1, *self.config.image_shape), device=first.device)
                return self.get_image_features(image, return_dict=True).pooler_output
        if not trains:
            return None
        parameters = [*self.vision_tower.parameters(), *self.multi_modal_projector.parameters()]
        # ZeRO-3 gathers a partitioned weight only inside its own module.
        trained = [p.flatten()[:1] for p in parameters if p.requires_grad and not hasattr(p, "ds_id")]
        return torch.cat([first.to(trained[0]) for first in trained]) if trained else None


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """A cache, given by either of its names."""
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("`cache` and `past_key_values` are two names of one argument: pass one of them.")
    return past_key_values if cache is None else cache


def kept_positions(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The positions that logits are wanted for."""
    if isinstance(logits_to_keep, int):
        return hidden_states[:, slice(-logits_to_keep, None)]
    if logits_to_keep.ndim == 1:
        return hidden_states[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    return torch.take_along_dim(hidden_states, logits_to_keep[..., None], dim=1)


class LavinForConditionalGeneration(LavinPreTrainedModel, LavinGenerationMixin):
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

    def merge_modality(self, modality: str) -> PreTrainedModel:
        """
        Folds the language model's active adapter into a plain language model for one modality: with
        U = s (w0 B + w1 D), each map that reads an adapted input becomes `W' = W (I + U A)`,
        `b' = b + W (U a0 + s (w0 b0 + w1 d0))`.

        Args:
            modality (`str`):
                `"text"`, or `"image"` for prompts that hold an image (as `inputs_embeds` with the image tokens in it).

        Returns:
            `PreTrainedModel`: the text architecture's own causal language model, without any adapter. A Llama has
            `attention_bias=True`.

        Raises:
            `ValueError`: if the architecture's maps take no bias, an adapted input goes into anything but linear maps,
                the result would compute something else, the base is quantised or offloaded, or no adapter is active.
        """
        return fold_modality(self, modality)

    def fold(self):
        """
        Folds the language model's active adapter into its own maps, in place, for both modalities: each map that reads
        an adapted input gets one weight for text and one for prompts with an image, and every row goes through its
        own. Generation then costs what the base's does (some percent more in a batch that mixes both); the memory of
        those maps doubles, a quarter of a Llama's. The maps are found by following the adapted input through forwards,
        and each folded module is compared with what it was. The vision tower's adapters route by token and stay.

        Returns:
            [`LavinForConditionalGeneration`]: this model, in eval mode. From here on it cannot be trained or saved,
            and adapters can neither be switched nor added.

        Raises:
            `ValueError`: if an adapted input goes into anything but linear maps (a norm, experts, a residual inside),
                the base is quantised or offloaded, no adapter is active, or it is folded already. Nothing has changed
                then.
        """
        return fold_both(self)

    def save_pretrained(self, *args, **kwargs):
        self.model.routing.check_not_folded()
        return super().save_pretrained(*args, **kwargs)


__all__ = ["LavinForConditionalGeneration", "LavinModel", "LavinPreTrainedModel"]
