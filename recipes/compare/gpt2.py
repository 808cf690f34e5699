"""The tiny GPT-2 of the ClipCap recipe, trained on the text that the quickstart's tiny Llama was trained on."""

import math
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from ..quickstart.pretrain import round_weights
from ..quickstart.pretrain_text import score_text, teach_all


NOISE = 0.8  # how unlike clean words the image slots become, as for the Llama
POSITIONS = 256  # the longest row of the quickstart has some 120 tokens


def gpt2_config(vocab_size: int) -> GPT2Config:
    """The Llama's shape: width 128, 4 layers of 4 heads, tied; learned positions, no dropout (0.9M parameters)."""
    return GPT2Config(
        vocab_size=vocab_size, n_embd=128, n_layer=4, n_head=4, n_positions=POSITIONS, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip


@torch.no_grad()
def structured_start(model: GPT2LMHeadModel):
    """
    What `quickstart.copying` does for a Llama: heads that copy start near where they end, so that minutes suffice.

    The first 64 dimensions are a token's own, the next 32 its place (sines, cosines), the last 32 those of the token
    before it. One head of the first layer looks one place back and writes into the last 32; two heads of every other
    layer look for tokens like their own and pass on what came before these.
    """
    width, size = model.config.n_embd, model.config.n_embd // model.config.n_head
    own, place, before = slice(0, width - 2 * size), slice(width - 2 * size, width - size), slice(width - size, width)
    tokens, places = model.transformer.wte.weight, model.transformer.wpe.weight
    tokens.normal_(0, 0.3)
    tokens[:, own.stop :] *= 0.1
    angles = torch.arange(len(places)).unsqueeze(1) * 100.0 ** (-torch.arange(size // 2) / (size // 2))
    places.zero_()
    places[:, place] = 0.4 * torch.cat([angles.sin(), angles.cos()], dim=1)
    model.transformer.ln_f.weight.fill_(0.3)
    for number, block in enumerate(model.transformer.h):
        weight = block.attn.c_attn.weight  # (width, 3 * width): from the input to queries, keys and values
        query, key, value = (weight[:, start * width : (start + 1) * width] for start in range(3))
        output = block.attn.c_proj.weight
        if number == 0:
            step = 100.0 ** (-torch.arange(size // 2) / (size // 2))
            sin, cos = torch.diag(step.sin()), torch.diag(step.cos())
            query[:, :size], key[:, :size] = 0, 0
            # The place one back, by the angles' addition formulas.
            query[place, :size] = 2.0 * torch.cat([torch.cat([cos, sin], 1), torch.cat([-sin, cos], 1)], 0)
            key[place, :size] = 2.0 * torch.eye(size)
            value[:, :size].normal_(0, 1 / math.sqrt(width))
            value[own.stop :, :size] = 0
            output[:size] = 0
            output[:size, before] = 0.3 * torch.eye(size)
        else:
            rows = slice(0, 2 * size)
            query[:, rows].normal_(0, 1 / math.sqrt(own.stop))
            query[own.stop :, rows] = 0
            key[:, rows] = query[:, rows]
            value[:, rows] = 0
            value[before, rows] = torch.eye(size).repeat(1, 2)
            output[rows].normal_(0, 0.3 / math.sqrt(size))


def make_gpt2(
    folder: Path, tokenizer: Path, steps: int = 1300, more_steps: int = 500, lesson_steps: int = 250, seed: int = 0
) -> dict[str, float]:
    """
    Trains the model from nothing and writes it with the Llama's own tokenizer.

    Args:
        folder (`Path`): Where model and tokenizer are written.
        tokenizer (`Path`): The tiny Llama's folder.
        steps, more_steps, lesson_steps (`int`, *optional*): As of `quickstart.pretrain_text.train_text`.
        seed (`int`, *optional*, defaults to 0): Seed of weights and rows.

    Returns:
        `dict[str, float]`: share of fresh rows whose letter is right: `text` only, with image `slots`.
    """
    tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(gpt2_config(len(tokenizer)))
    structured_start(model)
    teach_all(model, tokenizer, steps, more_steps, lesson_steps, NOISE, seed)
    scores = score_text(round_weights(model), tokenizer, NOISE)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return scores
