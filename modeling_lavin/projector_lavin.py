"""What lies between the towers: LaVIN's taps, InfMLLM's pool-adapter, or both, and the modality embedding."""

import math

import torch
from torch import nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_lavin import LavinConfig, check_pool_size


class LavinProjectorLinear(nn.Linear):
    """A linear map of the taps' projector: its class tells `_init_weights` that it starts Xavier-uniform."""


class LavinPoolLinear(nn.Linear):
    """A linear map of the pool-adapter: it starts as torch's own Linear does, which is what the release did."""

    def __init__(self, in_features: int, out_features: int, seed: int):
        super().__init__(in_features, out_features)
        self.seed = seed  # of its initial weights


class LavinPoolAdapter(nn.Module):
    """
    The pool-adapter of InfMLLM (arXiv 2311.06791): LayerNorm, mean over each cell's patches, Linear, GELU, Linear. The
    order of the cells and the vision tower's own positions are all that says where something is.
    """

    def __init__(self, config: LavinConfig):
        super().__init__()
        width, out = config.vision_config.hidden_size, config.text_config.hidden_size
        # The paper does not give its epsilon; the released code leaves it at torch's default.
        self.layer_norm = nn.LayerNorm(width, eps=1e-5)
        self.linear_1 = LavinPoolLinear(width, out, seed=1)
        self.act = nn.GELU()
        self.linear_2 = LavinPoolLinear(out, out, seed=2)

    def forward(self, patches: torch.Tensor, pool_size: int) -> torch.Tensor:
        """
        Args:
            patches (`torch.Tensor` of shape `(num_images, s * s, width)`): States of the patches, without class token,
                row by row.
            pool_size (`int`): Cells on each side, p.

        Returns:
            `torch.Tensor` of shape `(num_images, p * p, hidden_size)`: one image token for each cell, row by row.

        Raises:
            `ValueError`: if p does not divide s.
        """
        side = math.isqrt(patches.shape[1])
        check_pool_size(pool_size, side)
        states = self.layer_norm(patches.to(self.linear_1.weight.dtype))
        cell = side // pool_size
        cells = states.unflatten(1, (pool_size, cell, pool_size, cell)).mean(dim=(2, 4)).flatten(1, 2)
        return self.linear_2(self.act(self.linear_1(cells)))


class LavinMultiModalProjector(nn.Module):
    """
    For the taps Linear, SiLU, Linear, from the vision tower's width to the language model's (LaVIN, eq. 1); beside it
    or in its place the pool-adapter.
    """

    def __init__(self, config: LavinConfig):
        super().__init__()
        if config.reads_taps:
            self.linear_1 = LavinProjectorLinear(config.vision_config.hidden_size, config.projector_hidden_size)
            self.act = nn.SiLU()
            self.linear_2 = LavinProjectorLinear(config.projector_hidden_size, config.text_config.hidden_size)
        self.pool = LavinPoolAdapter(config) if config.reads_pool else None

    def forward(
        self, taps: torch.Tensor | None, patches: torch.Tensor | None = None, pool_size: int | None = None
    ) -> torch.Tensor:
        """
        Args:
            taps (`torch.Tensor` of shape `(num_images, num_taps, width)`, *optional*): States of the tapped blocks.
            patches (`torch.Tensor` of shape `(num_images, s * s, width)`, *optional*): Of the last hidden state.
            pool_size (`int`, *optional*): Cells on each side, where there are patches.

        Returns:
            `torch.Tensor` of shape `(num_images, num_image_tokens, hidden_size)`: the taps' tokens, then the cells'.
        """
        tokens = []
        if taps is not None:
            tokens.append(self.linear_2(self.act(self.linear_1(taps.to(self.linear_1.weight.dtype)))))
        if patches is not None:
            tokens.append(self.pool(patches, pool_size))
        return torch.cat(tokens, dim=1) if len(tokens) > 1 else tokens[0]


def draw_own(module: nn.Module) -> bool:
    """
    Initial weights of the modality embedding, N(0, 1), or of a linear map of the projector: from its own generator, so
    that all ranks agree.

    Returns:
        `bool`: whether `module` is one.
    """
    if isinstance(module, LavinProjectorLinear):  # Xavier-uniform, as the reference of LaVIN
        bound, seed = math.sqrt(6 / (module.in_features + module.out_features)), module.out_features
    elif isinstance(module, LavinPoolLinear):
        bound, seed = 1 / math.sqrt(module.in_features), module.seed
    elif isinstance(module, LavinModalityEmbedding):
        values = torch.empty(module.num_embeddings, module.embedding_dim)
        init.copy_(module.weight, values.normal_(generator=torch.Generator().manual_seed(0)))
        return True
    else:
        return False
    generator = torch.Generator().manual_seed(seed)
    shape = (module.out_features, module.in_features)
    init.copy_(module.weight, torch.empty(shape).uniform_(-bound, bound, generator=generator))
    if isinstance(module, LavinPoolLinear):
        init.copy_(module.bias, torch.empty(module.out_features).uniform_(-bound, bound, generator=generator))
    else:
        init.zeros_(module.bias)
    return True


class LavinTaps:
    """A forward hook of the tapped blocks, that notes what leaves them while `states` is a list."""

    def __init__(self):
        self.states = None

    def __call__(self, module, args, output):
        if self.states is not None:  # not in a recomputation by gradient checkpointing
            self.states.append(output[0] if isinstance(output, tuple) else output)


class LavinModalityEmbedding(nn.Embedding):
    """The modality token: row 0 for text-only input, row 1 for text with images (paper, section 3.2)."""


def flat_features(images: BaseModelOutputWithPooling) -> torch.Tensor:
    """The image tokens of all images, `(tokens, hidden_size)`; `generate` may hand them on in a list."""
    features = images.pooler_output
    features = features if isinstance(features, torch.Tensor) else torch.cat(list(features))
    return features.reshape(-1, features.shape[-1])


def image_places(model, inputs_embeds: torch.Tensor) -> torch.Tensor:
    """Where embedded text holds the image token, `(batch, length)`."""
    embedding = model.get_input_embeddings()
    if model.config.image_token_id >= embedding.num_embeddings:
        raise ValueError(
            "With `inputs_embeds` the image tokens must already be in it, as the image token has no row in the "
            "embedding: pass no images, but `modality_ids=1` for the rows that hold one."
        )
    token = embedding(torch.tensor(model.config.image_token_id, device=inputs_embeds.device))
    return (inputs_embeds == token.to(inputs_embeds)).all(dim=-1)


def merge_features(
    inputs_embeds: torch.Tensor, is_image: torch.Tensor, features: torch.Tensor | None, config: LavinConfig
) -> torch.Tensor:
    """Puts the image tokens at their places."""
    if not torch.compiler.is_compiling():
        tokens, given = int(is_image.sum()), 0 if features is None else features.shape[0]
        if tokens != given:
            raise ValueError(_mismatch(tokens, given, config))
    if features is None:
        return inputs_embeds
    return inputs_embeds.masked_scatter(is_image.unsqueeze(-1), features.to(inputs_embeds))


def _mismatch(tokens: int, features: int, config: LavinConfig) -> str:
    """What to do where the ids hold another number of image tokens than the images give."""
    message, each = f"Image features and image tokens do not match, tokens: {tokens}, features: {features}", 0
    if images := features // config.num_image_tokens:
        each = tokens // images if tokens % images == 0 else 0
    if each in (0, config.num_image_tokens):
        return message
    return (
        f"{message}. There are {each} tokens for each image, and this model (`projector_type` "
        f"{config.projector_type!r}) makes {config.num_image_tokens}: its processor must agree, "
        "`processor.num_image_tokens = model.config.num_image_tokens`."
    )
