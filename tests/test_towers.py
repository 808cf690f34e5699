"""Checkpoints of many kinds of towers, each read as a LaVIN and by its own class: no tensor differs."""

import pytest
import torch
import transformers
from conftest import SHAPE, VISION_SHAPE
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    SiglipConfig,
    SiglipModel,
)

from lavin import LavinForConditionalGeneration
from lavin.configuration_lavin import vision_part
from lavin.fit_lavin import architecture


TEXT_HALF = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
HEADS = {  # checkpoints that hold a tower: the class they were written by
    "ViT": ("Model", "ForImageClassification", "ForMaskedImageModeling"),
    "DeiT": ("Model", "ForImageClassification"),
    "Beit": ("Model", "ForImageClassification", "ForMaskedImageModeling"),
    "Data2VecVision": ("Model", "ForImageClassification"),
    "Dinov2": ("Model", "ForImageClassification"),
    "Dinov2WithRegisters": ("Model", "ForImageClassification"),
    "DINOv3ViT": ("Model",),
    "IJepa": ("Model", "ForImageClassification"),
    "ViTMSN": ("Model", "ForImageClassification"),
    "CLIPVision": ("Model", "ModelWithProjection"),
    "SiglipVision": ("Model",),
    "DPT": ("ForDepthEstimation",),
}
CASES = [f"{family}{head}" for family, heads in HEADS.items() for head in heads] + ["CLIPModel", "SiglipModel"]


def written_by(case: str):
    if case in ("CLIPModel", "SiglipModel"):
        config = {"CLIPModel": CLIPConfig, "SiglipModel": SiglipConfig}[case]
        whole = {"CLIPModel": CLIPModel, "SiglipModel": SiglipModel}[case]
        return whole(config(text_config=TEXT_HALF, vision_config=VISION_SHAPE))
    family = next(f for f, heads in HEADS.items() if case in [f + head for head in heads])
    return getattr(transformers, case)(getattr(transformers, f"{family}Config")(**VISION_SHAPE, num_channels=3))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder)
    return folder


@torch.no_grad()
def compare_tower(vision, text):
    config = vision_part(AutoConfig.from_pretrained(vision))
    own = architecture(AutoModel, config).from_pretrained(vision, config=config).eval()
    tower = LavinForConditionalGeneration.from_vision_text_pretrained(vision, text).eval().model.vision_tower
    a, b = own.state_dict(), tower.state_dict()
    assert a.keys() == b.keys()
    # A pooler that the checkpoint lacks is drawn anew by both; LaVIN never reads it.
    assert not [name for name in a if not torch.equal(a[name], b[name]) and not name.startswith("pooler.")]
    pixels = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(own(pixels).last_hidden_state, tower(pixels).last_hidden_state, rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES)
def test_a_towers_checkpoint_is_read_whole(case, text, tmp_path):
    written_by(case).save_pretrained(tmp_path)
    compare_tower(tmp_path, text)


@pytest.mark.parametrize("case", ["ViTForImageClassification", "Dinov2Model", "CLIPModel"])
@pytest.mark.parametrize("kind", ["shards", "pickled", "pickled shards"])
def test_a_towers_checkpoint_of_other_files(case, kind, text, tmp_path):
    model = written_by(case)
    model.save_pretrained(tmp_path, **({"max_shard_size": "5KB"} if "shards" in kind else {}))
    if "pickled" in kind:
        for file in sorted(tmp_path.glob("*.safetensors")):
            torch.save(load_file(file), tmp_path / (file.stem.replace("model", "pytorch_model") + ".bin"))
            file.unlink()
        for index in tmp_path.glob("model.safetensors.index.json"):
            content = index.read_text().replace(".safetensors", ".bin").replace("model-0", "pytorch_model-0")
            (tmp_path / "pytorch_model.bin.index.json").write_text(content)
            index.unlink()
    compare_tower(tmp_path, text)


def change(folder, add=None, remove=()):
    """Adds tensors to a checkpoint, or takes some away."""
    tensors = {**load_file(folder / "model.safetensors"), **(add or {})}
    tensors = {key: value for key, value in tensors.items() if key not in remove}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("key", ["encoder.layer.9.output.dense.weight", "norm.weight"])
def test_what_a_tower_has_no_place_for_is_an_error(key, text, tmp_path):
    written_by("ViTModel").save_pretrained(tmp_path)
    change(tmp_path, {key: torch.ones(16)})
    with pytest.raises(ValueError, match=r"no place in a LaVIN.*ViTModel.*" + r"dense|norm"):
        LavinForConditionalGeneration.from_vision_text_pretrained(tmp_path, text)


@pytest.fixture
def vision(tmp_path):
    CLIPVisionModel(CLIPVisionConfig(**VISION_SHAPE)).save_pretrained(tmp_path / "vision")
    return tmp_path / "vision"


@pytest.mark.parametrize(
    "key", ["lm_head.bias", "lm_head.dense.weight", "head.norm.weight", "model.layers.3.x.weight"]
)
def test_what_a_language_model_has_no_place_for_is_an_error(key, vision, tmp_path):
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(tmp_path / "text")
    change(tmp_path / "text", {key: torch.ones(4)})
    with pytest.raises(ValueError, match=f"no place in a LaVIN.*LlamaForCausalLM.*{key}"):
        LavinForConditionalGeneration.from_vision_text_pretrained(vision, tmp_path / "text")


def test_buffers_of_old_checkpoints_are_left_out(vision, tmp_path):
    """A Pythia of 2023: rotary frequencies, causal masks and their fill value in every layer."""
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**SHAPE)).eval()
    model.save_pretrained(tmp_path / "text")
    layer = "gpt_neox.layers.0.attention."
    mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    old = {"bias": mask, "masked_bias": torch.tensor(-1e9), "rotary_emb.inv_freq": torch.ones(4)}
    change(tmp_path / "text", {layer + key: value for key, value in old.items()})
    lavin = LavinForConditionalGeneration.from_vision_text_pretrained(vision, tmp_path / "text").eval()
    ids = torch.randint(3, 60, (2, 7))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, lavin(ids).logits)


def test_layers_that_the_architecture_itself_leaves_out(vision, tmp_path):
    """Layers for multi-token prediction lie behind the last one."""
    from test_fit import RIGHT, config_of

    own = transformers.DeepseekV3ForCausalLM(config_of("DeepseekV3", RIGHT["DeepseekV3"])).eval()
    own.save_pretrained(tmp_path / "text")
    change(tmp_path / "text", {"model.layers.61.eh_proj.weight": torch.ones(4)})
    LavinForConditionalGeneration.from_vision_text_pretrained(vision, tmp_path / "text")


def test_a_base_without_its_prefix_and_a_tied_head_beside_it(vision, tmp_path):
    config = LlamaConfig(**{**SHAPE, "tie_word_embeddings": True})
    model = LlamaForCausalLM(config).eval()
    model.model.save_pretrained(tmp_path / "text")
    change(tmp_path / "text", {"lm_head.weight": model.lm_head.weight.detach().clone()})
    lavin = LavinForConditionalGeneration.from_vision_text_pretrained(vision, tmp_path / "text").eval()
    ids = torch.randint(3, 60, (2, 7))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, lavin(ids).logits)


def test_a_full_folder_with_more_than_its_configuration_says(vision, text, tmp_path):
    folder = tmp_path / "full"
    LavinForConditionalGeneration.from_vision_text_pretrained(vision, text).save_pretrained(folder, full=True)
    change(folder, {"model.language_model.layers.7.mlp.up_proj.weight": torch.ones(4)})
    with pytest.raises(ValueError, match=r"hold more than its config.json says: .*layers\.7"):
        LavinForConditionalGeneration.from_pretrained(folder)
