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
        projector_type (`str`, *optional*, defaults to `"taps"`):
            What becomes image tokens. `"taps"`: the class token after some blocks (LaVIN). `"pool"`: the patches of
            the tower's last hidden state, pooled to a square of cells (the pool-adapter of InfMLLM, arXiv
            2311.06791). `"taps_pool"`: both, the taps' tokens first, each with a projector of its own.
        projector_hidden_size (`int`, *optional*, defaults to 128):
            Width between the two linear layers of the taps' projector. The pool-adapter's is the language model's own.
        vision_feature_layers (`list[int]`, *optional*, defaults to every 4th block):
            Blocks of the vision tower, counted from 1, after which the class token is read. Each is one image token;
            a tower without a class token (SigLIP) gives the mean of its patch states there. Empty with `"pool"`,
            which reads none.
        pool_size (`int`, *optional*, defaults to 16):
            Cells on each side, p, of the pool-adapter: p * p image tokens, in row-major order. Must divide s, the
            patches on each side of an image. It has no weights: one checkpoint may be loaded with any that does.
        image_size (`int`, *optional*, defaults to the vision tower's):
            Pixels on each side of an image: what the processor makes, and what s follows from. For another size than
            the tower's own, its position embeddings are interpolated.
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
    >>> LavinConfig(projector_type="pool", pool_size=8).num_image_tokens
    64
    ```
    """

    model_type = "lavin"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}
    has_no_defaults_at_init = False
    # What `Trainer.predict` cannot put together: of a mixed batch each has rows or lengths of its own.
    keys_to_ignore_at_inference = ["past_key_values", "cache", "hidden_states", "attentions", "image_hidden_states"]

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    projector_type: str = "taps"
    projector_hidden_size: int = 128
    vision_feature_layers: list[int] | None = None
    pool_size: int = 16
    image_size: int | list[int] | tuple[int, int] | None = None
    image_token_id: int | None = None
    text_checkpoint: dict | str | None = None
    vision_checkpoint: dict | str | None = None
    base_checkpoint: dict | str | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        self.vision_config = vision_part(_as_config(self.vision_config, "clip_vision_model", VIT_L_14))
        self.text_config = _as_config(self.text_config, "llama", {}).get_text_config(decoder=True)
        for field in ("image_size", "num_hidden_layers"):
            if not hasattr(self.vision_config, field):
                kind = self.vision_config.model_type
                raise ValueError(f"`vision_config` must be of a vision tower, got a {kind}, which has no `{field}`.")
        # Only the outer flag decides whether the head is tied to the embedding.
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        if self.projector_type not in PROJECTOR_TYPES:
            raise ValueError(f"`projector_type` must be one of {PROJECTOR_TYPES}, got {self.projector_type!r}.")
        if self.vision_feature_layers is None:
            depth = self.vision_config.num_hidden_layers
            self.vision_feature_layers = default_vision_feature_layers(depth) if self.reads_taps else []
        if not isinstance(self.vision_feature_layers, list | tuple):
            raise ValueError(f"`vision_feature_layers` must be a list of blocks, got {self.vision_feature_layers!r}.")
        self.vision_feature_layers = list(self.vision_feature_layers)
        if self.image_size is None:
            self.image_size = getattr(self.vision_config, "image_size", None)
        if self.image_token_id is None:
            self.image_token_id = getattr(self.text_config, "vocab_size", 0)
        for kind in CHECKPOINTS:
            if isinstance(name := getattr(self, kind), str):
                setattr(self, kind, {"name": name, "revision": None})
        self._check_ranges()
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # The base sets arguments of `from_pretrained` on the finished config: nothing would be checked, nor follow.
        own = {key: kwargs.pop(key) for key in OWN_FIELDS if key in kwargs}
        return super().from_dict({**config_dict, **own}, **kwargs)

    @property
    def reads_taps(self) -> bool:
        """Whether class tokens of tapped blocks become image tokens."""
        return self.projector_type != "pool"

    @property
    def reads_pool(self) -> bool:
        """Whether the pool-adapter's cells become image tokens."""
        return self.projector_type != "taps"

    @property
    def num_image_tokens(self) -> int:
        """Image tokens of one image: one per tap, and one per cell."""
        return len(self.vision_feature_layers) + self.reads_pool * self.pool_size**2

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a preprocessed image."""
        return (getattr(self.vision_config, "num_channels", 3), *sides(self.image_size))

    def _check_ranges(self):
        if not hasattr(self.text_config, "vocab_size"):
            raise ValueError(f"`text_config` must be of a language model, got a {self.text_config.model_type}.")
        for name in ("projector_hidden_size", "pool_size", "image_token_id"):
            if not isinstance(getattr(self, name), int) or isinstance(getattr(self, name), bool):
                raise ValueError(f"`{name}` must be a whole number, got {getattr(self, name)!r}.")
        depth = self.vision_config.num_hidden_layers
        taps = self.vision_feature_layers
        if taps and not self.reads_taps:
            raise ValueError(
                "`vision_feature_layers` belongs to the taps, and `projector_type` 'pool' reads the tower's last "
                f"hidden state: leave it out, or choose 'taps_pool'. Got {taps}."
            )
        if self.reads_taps and (not taps or any(not 1 <= tap <= depth for tap in taps) or sorted(set(taps)) != taps):
            raise ValueError(
                f"`vision_feature_layers` must be rising block numbers between 1 and {depth} (its depth), got {taps}."
            )
        for name in ("projector_hidden_size", "pool_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if len(sides(self.image_size)) != 2 or not all(isinstance(side, int) for side in sides(self.image_size)):
            raise ValueError(f"`image_size` must be a whole number, got {self.image_size!r}.")
        check_image_size(*sides(self.image_size), self.vision_config)
        if self.reads_pool:
            check_pool_size(self.pool_size, patches_per_side(*sides(self.image_size), self.vision_config))
        if self.image_token_id < 0:
            raise ValueError(f"`image_token_id` must be 0 or more, got {self.image_token_id}.")


PROJECTOR_TYPES = ("taps", "pool", "taps_pool")
OWN_FIELDS = (  # what a LaVIN is beyond its two towers
    "projector_type",
    "projector_hidden_size",
    "vision_feature_layers",
    "pool_size",
    "image_size",
    "image_token_id",
)
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


def sides(image_size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """Height and width, of a size that may be one number for both."""
    return tuple(image_size) if isinstance(image_size, (list, tuple)) else (image_size, image_size)


def check_image_size(height: int, width: int, vision_config: PreTrainedConfig):
    """
    Raises:
        `ValueError`: if a vision tower cannot read images of so many pixels: they are neither of its own size, nor
            squares of whole patches, for which its positions can be interpolated.
    """
    own = sides(vision_config.image_size)
    if (height, width) == own:
        return
    patch = getattr(vision_config, "patch_size", None)
    if height != width:
        raise ValueError(
            f"Images of {height} x {width} pixels: `image_size` must be one number for both sides, or the vision "
            f"tower's own {own[0]} x {own[1]}."
        )
    if not isinstance(patch, int):
        raise ValueError(
            f"Images of {height} x {width} pixels: a {vision_config.model_type} reads {own[0]} x {own[1]} only."
        )
    if height < patch or height % patch:
        near = [size for size in (height // patch * patch, (height // patch + 1) * patch) if size]
        raise ValueError(
            f"Images of {height} x {width} pixels: `image_size` must be a multiple of the vision tower's `patch_size` "
            f"{patch}. The nearest: {' and '.join(map(str, near))}."
        )


def patches_per_side(height: int, width: int, vision_config: PreTrainedConfig) -> int:
    """
    Patches on each side of an image, s.

    Raises:
        `ValueError`: if the vision tower has no square grid of patches.
    """
    patch = getattr(vision_config, "patch_size", None)
    if height != width or not isinstance(patch, int):
        raise ValueError(
            f"The pool-adapter needs a square grid of patches, and a {vision_config.model_type} that reads {height} x "
            f"{width} pixels has none: choose `projector_type` 'taps'."
        )
    return height // patch


def check_pool_size(pool_size: int, side: int):
    """
    Raises:
        `ValueError`: if p cells do not divide the s patches of a side; it names both and the nearest p that do.
    """
    if side % pool_size:
        divisors = [cells for cells in range(1, side + 1) if side % cells == 0]
        near = [max(p for p in divisors if p < pool_size), *[p for p in divisors if p > pool_size][:1]]
        raise ValueError(
            f"`pool_size` p = {pool_size} does not divide s = {side}, the patches on each side of an image. The "
            f"nearest that {'do are' if len(near) > 1 else 'does is'} {' and '.join(map(str, near))}."
        )


__all__ = ["LavinConfig"]
