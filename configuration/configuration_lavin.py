"""What a LaVIN is: two towers, the taps between them, and where their weights come from."""

from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import logging


logger = logging.get_logger(__name__)

TAP_EVERY = 4  # LaVIN reads the class token after every fourth block (paper, section 3.3)


class LavinConfig(PreTrainedConfig):
    r"""
    Configuration of a [`LavinModel`]: a frozen vision encoder, a frozen language model, and the small parts between
    them (Luo et al., "Cheap and Quick: Efficient Vision-Language Instruction Tuning for Large Language Models",
    NeurIPS 2023, arXiv 2305.15023).

    Args:
        vision_config (`PreTrainedConfig` or `dict`, *optional*, defaults to `CLIPVisionConfig` of ViT-L/14):
            Configuration of the vision tower. A whole CLIP or SigLIP configuration is accepted; its vision part is
            taken.
        text_config (`PreTrainedConfig` or `dict`, *optional*, defaults to `LlamaConfig`):
            Configuration of the decoder-only language model.
        projector_hidden_size (`int`, *optional*, defaults to 128):
            Width between the projector's two linear layers.
        vision_feature_layers (`list[int]`, *optional*, defaults to every 4th block):
            Blocks of the vision tower, counted from 1, after which the class token is read. Each is one image token;
            a tower without a class token (SigLIP) gives the mean of its patch states there.
        image_token_id (`int`, *optional*, defaults to `text_config.vocab_size`):
            Id that stands for one image token in `input_ids`. It needs no row in the embedding and is never
            generated.
        text_checkpoint (`dict`, *optional*):
            Where the language model's weights come from when this folder holds none: `{"name", "revision"}`.
        vision_checkpoint (`dict`, *optional*):
            The same for the vision tower.
        base_checkpoint (`dict`, *optional*):
            A full LaVIN folder whose weights are the base, where the towers are no longer those of a named pair.
            It goes before the two above.

    Raises:
        `ValueError`: if a field is out of range; the message names the field and the values that are allowed.

    Example:

    ```python
    >>> from lavin import LavinConfig
    >>> config = LavinConfig()
    >>> config.vision_feature_layers, config.num_image_tokens
    ([4, 8, 12, 16, 20, 24], 6)
    ```
    """

    model_type = "lavin"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}
    has_no_defaults_at_init = False
    keys_to_ignore_at_inference = ["past_key_values"]

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    projector_hidden_size: int = 128
    vision_feature_layers: list[int] | None = None
    image_token_id: int | None = None
    text_checkpoint: dict | str | None = None
    vision_checkpoint: dict | str | None = None
    base_checkpoint: dict | str | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        self.vision_config = vision_part(_as_config(self.vision_config, "clip_vision_model", VIT_L_14))
        self.text_config = _as_config(self.text_config, "llama", {}).get_text_config(decoder=True)
        # Only the outer flag decides whether the head is tied to the embedding.
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        if self.vision_feature_layers is None:
            self.vision_feature_layers = default_vision_feature_layers(self.vision_config.num_hidden_layers)
        if not isinstance(self.vision_feature_layers, list | tuple):
            raise ValueError(f"`vision_feature_layers` must be a list of blocks, got {self.vision_feature_layers!r}.")
        self.vision_feature_layers = list(self.vision_feature_layers)
        if self.image_token_id is None:
            self.image_token_id = getattr(self.text_config, "vocab_size", 0)
        for kind in CHECKPOINTS:
            if isinstance(name := getattr(self, kind), str):
                setattr(self, kind, {"name": name, "revision": None})
        self._check_ranges()
        super().__post_init__(**kwargs)

    @property
    def num_image_tokens(self) -> int:
        """Image tokens of one image: one per tap."""
        return len(self.vision_feature_layers)

    def _check_ranges(self):
        if not hasattr(self.vision_config, "image_size"):
            raise ValueError(f"`vision_config` must be of a vision tower, got a {self.vision_config.model_type}.")
        if not hasattr(self.text_config, "vocab_size"):
            raise ValueError(f"`text_config` must be of a language model, got a {self.text_config.model_type}.")
        for name in ("projector_hidden_size", "image_token_id"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"`{name}` must be a whole number, got {getattr(self, name)!r}.")
        depth = self.vision_config.num_hidden_layers
        taps = self.vision_feature_layers
        if not taps or any(not 1 <= tap <= depth for tap in taps) or sorted(set(taps)) != taps:
            raise ValueError(
                f"`vision_feature_layers` must be rising block numbers between 1 and {depth} (its depth), got {taps}."
            )
        if self.projector_hidden_size < 1:
            raise ValueError(f"`projector_hidden_size` must be at least 1, got {self.projector_hidden_size}.")
        if self.image_token_id < 0:
            raise ValueError(f"`image_token_id` must be 0 or more, got {self.image_token_id}.")


CHECKPOINTS = ("text_checkpoint", "vision_checkpoint", "base_checkpoint")
VIT_L_14 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 224,
    "projection_dim": 768,
}


def _as_config(value, model_type: str, defaults: dict) -> PreTrainedConfig:
    if value is None:
        return AutoConfig.for_model(model_type, **defaults)
    if isinstance(value, dict):
        return AutoConfig.for_model(**{"model_type": model_type, **value})
    return value


def vision_part(config: PreTrainedConfig) -> PreTrainedConfig:
    """The vision tower's configuration, also of a whole CLIP or SigLIP configuration."""
    return getattr(config, "vision_config", config)


def default_vision_feature_layers(num_hidden_layers: int) -> list[int]:
    """Every fourth block, counted from 1; a shallower tower is tapped at its last block."""
    return list(range(TAP_EVERY, num_hidden_layers + 1, TAP_EVERY)) or [num_hidden_layers]


__all__ = ["LavinConfig"]
