"""Parity with the reference implementation, whose own run on a tiny model is stored in `fixtures/lavin_reference`."""

import argparse
import json
import re
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig

from lavin import LavinConfig, LavinForConditionalGeneration, MMAConfig


FIXTURE = Path(__file__).parent / "fixtures" / "lavin_reference"
EXPECTED = load_file(FIXTURE / "expected.safetensors")
CASE = json.loads((FIXTURE / "case.json").read_text())
WITH_IMAGE = [i for i, has in enumerate(CASE["has_image"]) if has]
BATCHES = {
    "one by one": ([[0], [1], [2], [3]], "right"),
    "padded right": ([[0, 1, 2, 3]], "right"),
    "padded left": ([[0, 1, 2, 3]], "left"),
}


def reference_name(name: str) -> str | None:
    """Name of one of our trained weights in the reference; None for the up maps, which are two there."""
    leaf = name.rsplit(".", 1)[-1]
    if "multi_modal_projector" in name:
        return f"adapter_proj.conv_{'A' if 'linear_1' in name else 'B'}.{leaf}"
    if "modality_embedding" in name:
        return "adapter_modality_embedding.weight"
    tower = "layers" if "language_model" in name else "backbone.visual.transformer.resblocks"
    stem = f"{tower}.{re.search(r'layers[.]([0-9]+)[.]', name).group(1)}.adapter_attn."
    part = re.search(r"adapter_(down|up|router)", name).group(1)
    return stem + {"down": "conv_A", "up": "conv_B|conv_D", "router": "expert_weights"}[part] + f".{leaf}"


def from_reference(name: str, get) -> torch.Tensor:
    source = reference_name(name)
    if "|" not in source:
        tensor = get(source)
        return tensor.squeeze(-1) if "conv_A.weight" in source and "adapter_attn" in source else tensor
    stem, leaf = source.split("conv_B|conv_D")
    tensor = torch.stack([get(stem + "conv_B" + leaf), get(stem + "conv_D" + leaf)])
    return tensor.squeeze(-1) if leaf == ".weight" else tensor


@pytest.fixture(scope="module")
def model():
    config = LavinConfig(
        vision_config=AutoConfig.from_pretrained(FIXTURE / "clip"),
        text_config=AutoConfig.from_pretrained(FIXTURE / "llama"),
        projector_hidden_size=CASE["hidden_proj"],
    )
    weights = {f"model.vision_tower.{k}": v for k, v in load_file(FIXTURE / "clip/model.safetensors").items()}
    for key, value in load_file(FIXTURE / "llama/model.safetensors").items():
        weights[key.replace("model.", "model.language_model.")] = value
    lavin = LavinForConditionalGeneration.from_pretrained(None, config=config, state_dict=weights)
    mma = MMAConfig(
        r=CASE["adapter_dim"],
        groups=CASE["groups"],
        scale=CASE["scale"],
        router_temperature=CASE["temperature"],
    )
    peft = get_peft_model(lavin, mma, adapter_name="mma")
    with torch.serialization.safe_globals([argparse.Namespace]):
        stored = torch.load(FIXTURE / "checkpoint-19.pth", weights_only=True)["model"]
    stored = {key.removeprefix("module."): value for key, value in stored.items()}
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(from_reference(name, stored.__getitem__))
    return peft.eval()


def inputs_of(rows: list[int], side: str, image_token_id: int):
    length = max(len(EXPECTED[f"{i}.input_ids"]) for i in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, CASE["label_ignore"])
    places, images = [], []
    for j, i in enumerate(rows):
        tokens = EXPECTED[f"{i}.input_ids"]
        where = slice(length - len(tokens), length) if side == "left" else slice(0, len(tokens))
        ids[j, where] = torch.where(tokens < 0, image_token_id, tokens)
        mask[j, where], labels[j, where] = 1, EXPECTED[f"{i}.labels"]
        places.append(where)
        images += [EXPECTED[f"{i}.pixel_values"]] if i in WITH_IMAGE else []
    pixel_values = torch.stack(images) if images else None
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixel_values, "labels": labels}, places


@pytest.mark.parametrize("name", BATCHES)
def test_logits_loss_and_gradients(model, name):
    batches, side = BATCHES[name]
    model.zero_grad()
    total = 0.0
    for rows in batches:
        inputs, places = inputs_of(rows, side, model.config.image_token_id)
        outputs = model(**inputs)
        for j, i in enumerate(rows):
            torch.testing.assert_close(outputs.logits[j, places[j]], EXPECTED[f"{i}.logits"], atol=1e-5, rtol=0)
        total = total + outputs.loss * (inputs["labels"][:, 1:] != CASE["label_ignore"]).sum()
    total.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected = from_reference(name, lambda key: EXPECTED[f"grad.{key}"])
            error = (parameter.grad - expected).norm() / expected.norm().clamp_min(1e-12)
            assert error < 1e-4, (name, error)


def test_loss_of_each_row(model):
    for i in range(CASE["samples"]):
        inputs, _ = inputs_of([i], "right", model.config.image_token_id)
        with torch.no_grad():
            assert abs(model(**inputs).loss.item() - EXPECTED[f"{i}.loss"].item()) < 1e-5


def test_routing_table_and_image_features(model):
    lavin = model.get_base_model()
    with torch.no_grad():
        table = lavin.routing_table()
        for i in range(CASE["samples"]):
            torch.testing.assert_close(table[:, int(i in WITH_IMAGE)], EXPECTED[f"{i}.router"], atol=1e-5, rtol=0)
        for i in WITH_IMAGE:
            images = lavin.get_image_features(EXPECTED[f"{i}.pixel_values"][None])
            torch.testing.assert_close(images.pooler_output[0], EXPECTED[f"{i}.image_embeds"], atol=1e-5, rtol=0)
            torch.testing.assert_close(images.tapped_states[0], EXPECTED[f"{i}.image_features"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("modality", ["text", "image"])
def test_folded_model_gives_the_reference_logits(model, modality):
    i = WITH_IMAGE[0] if modality == "image" else next(i for i in range(CASE["samples"]) if i not in WITH_IMAGE)
    lavin, ids = model.get_base_model(), EXPECTED[f"{i}.input_ids"]
    with torch.no_grad():
        embeds = lavin.get_input_embeddings()(ids.clamp(min=0))
        if modality == "image":
            embeds[ids < 0] = lavin.get_image_features(EXPECTED[f"{i}.pixel_values"][None]).pooler_output[0]
        logits = model.merge_modality(modality)(inputs_embeds=embeds[None]).logits[0]
    torch.testing.assert_close(logits, EXPECTED[f"{i}.logits"], atol=1e-4, rtol=0)
