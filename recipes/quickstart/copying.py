"""How the tiny language model's heads start: near the circuit that finds a word's letter in a list of options."""

import math

import torch
from transformers import LlamaForCausalLM


@torch.no_grad()
def structured_start(model: LlamaForCausalLM):
    """
    Starts the heads that copying needs, which plain initialisation does not find in minutes.

    One head of the first layer attends to the previous token (a constant feature of the embedding gives it fixed
    queries and keys, and the rotary angles do the rest) and writes what it finds into dimensions of its own. Two heads
    of every other layer look for positions whose word is like their own (`W_k = W_q` on the other dimensions,
    "mimetic initialisation", arXiv 2305.09828): so a word in a list of options knows the letter before it, and is
    found by whoever holds the same word.
    """
    config, layers = model.config, model.model.layers
    width, size = config.hidden_size, config.hidden_size // config.num_attention_heads
    own = width - size  # first dimension of those for the previous token
    embedding = model.model.embed_tokens.weight
    embedding.normal_(0, 0.3)
    embedding[:, own:] *= 0.1
    embedding[:, 0] = 1.0
    model.model.norm.weight.fill_(0.3)
    frequencies = 1.0 / config.rope_parameters["rope_theta"] ** (torch.arange(0, size, 2) / size)
    first = layers[0].self_attn
    query, key = torch.zeros(size), torch.zeros(size)
    used = slice(0, size // 4)  # the fast angles: they tell neighbours apart
    query[: size // 2][used] = 2.0
    key[: size // 2][used] = 2.0 * frequencies[used].cos()
    key[size // 2 :][used] = 2.0 * frequencies[used].sin()
    for projection, constant in ((first.q_proj, query), (first.k_proj, key)):
        projection.weight[:size] = 0
        projection.weight[:size, 0] = constant
    first.v_proj.weight[:size].normal_(0, 1 / math.sqrt(width))
    first.v_proj.weight[:size, 0] = 0
    first.o_proj.weight[:, :size] = 0
    first.o_proj.weight[own:, :size] = 0.3 * torch.eye(size)
    for layer in layers[1:]:
        attention, rows = layer.self_attn, 2 * size
        attention.q_proj.weight[:rows].normal_(0, 1 / math.sqrt(width))
        attention.q_proj.weight[:rows, own:] = 0
        attention.q_proj.weight[:rows, 0] = 0
        attention.k_proj.weight[:rows] = attention.q_proj.weight[:rows]
        attention.v_proj.weight[:rows] = 0
        attention.v_proj.weight[:rows, own:] = torch.eye(size).repeat(2, 1)  # they pass on what came before it
        attention.o_proj.weight[:, :rows].normal_(0, 0.3 / math.sqrt(size))
