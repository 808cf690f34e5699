"""`lavin convert` of InfMLLM's pool-adapter."""

import pytest
import torch
from conftest import difference
from test_pool import ask, described, lavin

from lavin import LavinForConditionalGeneration
from lavin.recipes.convert import convert_checkpoint
from lavin.recipes.convert_pool import POOL_KEYS
from lavin.recipes.load import load_model


def released(width: int = 16, out: int = 32) -> dict[str, torch.Tensor]:
    shapes = {"layer_norm": (width,), "linear_1": (out, width), "linear_2": (out, out)}
    torch.manual_seed(3)
    weights = {}
    for theirs, ours in POOL_KEYS.items():
        shape = shapes[ours.split(".")[0]]
        weights[theirs] = torch.randn(shape if ours.endswith("weight") else shape[:1])
    return {**weights, "visual_encoder.cls_token": torch.zeros(1, 1, 1), "lm_model.lm_head.weight": torch.zeros(2, 2)}


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True], ids=["light", "full"])
def test_convert_reads_the_release(full, pair, tmp_path):
    torch.save({"model": {f"module.{k}": v for k, v in released().items()}}, tmp_path / "infmllm.pth")
    towers = ["--text-model", pair / "text", "--vision-model", pair / "vision"]
    arguments = ["convert", tmp_path / "infmllm.pth", *towers, "--output", tmp_path / "out", "--image-size", 56]
    assert "p = 16" in lavin(*arguments, code=2) and not (tmp_path / "out").exists()
    said = lavin(*arguments, "--pool-size", 2, *["--full"] * full)
    assert "2 weights of its own towers" in said
    assert (tmp_path / "out" / "model.safetensors").exists() == full != (tmp_path / "out" / "mma").exists()
    model, processor = load_model(tmp_path / "out")
    inputs = ask(processor)
    with torch.no_grad():
        states = model.model.vision_tower(inputs["pixel_values"], interpolate_pos_encoding=True).last_hidden_state
        out = model(**inputs)
        expected = described(states[:, 1:], {ours: released()[key] for key, ours in POOL_KEYS.items()}, 2)
        scale = expected.abs().max()
        assert difference(out.image_hidden_states / scale, expected / scale) < 1e-6
        if not full:  # the adapter beside it is the identity
            text = model.model.language_model
            ids = inputs["input_ids"]
            embeds = model.get_input_embeddings()(ids.masked_fill(ids == model.config.image_token_id, 0))
            embeds[ids == model.config.image_token_id] = out.image_hidden_states.flatten(0, 1)
            model.disable_adapters()
            plain = text(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).last_hidden_state
            assert difference(model.lm_head(plain), out.logits) < 1e-5
    peft = LavinForConditionalGeneration.from_pretrained(tmp_path / "out", mma={})  # and training goes on from it
    trained = peft.get_base_model().model.multi_modal_projector.modules_to_save["mma"].pool
    assert torch.equal(trained.linear_1.weight, released()["pooler.mlp.0.weight"])
    assert trained.linear_1.weight.requires_grad


def test_convert_lists_what_does_not_fit(pair, tmp_path):
    weights = {**released(width=17), "pooler.mlp.4.weight": torch.zeros(1)}
    del weights["ln_vision.bias"]
    torch.save(weights, tmp_path / "wrong.pth")
    arguments = tmp_path / "wrong.pth", pair / "text", pair / "vision", tmp_path / "out"
    with pytest.raises(ValueError) as error:
        convert_checkpoint(*arguments, pool_size=1)
    for line in (
        "missing: ln_vision.bias",
        "unexpected: pooler.mlp.4.weight",
        "(32, 17) in the file, (32, 16) in this",
    ):
        assert line in str(error.value), error.value
    assert "visual_encoder" not in str(error.value) and not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="pool-adapter, which has no --groups"):
        convert_checkpoint(*arguments, groups=2)
