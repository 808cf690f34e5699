"""`lavin convert`: the released checkpoints of the reference implementation, and what is not one."""

import argparse
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_reference import BATCHES, CASE, EXPECTED, FIXTURE, WITH_IMAGE, from_reference, inputs_of
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedTokenizerFast,
)

from lavin import LavinForConditionalGeneration, LavinPeftModel, LavinProcessor
from lavin.recipes.convert import convert_checkpoint


CHECKPOINT, TEXT, VISION = FIXTURE / "checkpoint-19.pth", FIXTURE / "llama", FIXTURE / "clip"
TEXT_WIDTH, TEXT_DEPTH, VISION_WIDTH, VISION_DEPTH = 32, 3, 16, 8


def read(file=CHECKPOINT) -> dict:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(file, weights_only=True)


def released(r=8, groups=2, block=False, visual="router", **args) -> dict:
    """A checkpoint with the reference's names, filled with noise, built here from what `method.md` says of them."""
    torch.manual_seed(0)
    weights = {}

    def adapter(stem, width, routed=True):
        shapes = {"conv_A": (r, width, 1), "conv_B": (width, r // groups, 1)}
        shapes.update({"conv_D": (width, r // groups, 1), "expert_weights": (2, width)} if routed else {})
        for name, shape in shapes.items():
            weights[f"module.{stem}.{name}.weight"] = torch.randn(shape)
            weights[f"module.{stem}.{name}.bias"] = torch.randn(shape[0])

    for i in range(TEXT_DEPTH):
        for kind in ("attn", "mlp")[: 1 + block]:
            adapter(f"layers.{i}.adapter_{kind}", TEXT_WIDTH)
    for i in range(VISION_DEPTH):
        for kind in ("attn", "mlp")[: 1 + (visual == "router_block")]:
            adapter(f"backbone.visual.transformer.resblocks.{i}.adapter_{kind}", VISION_WIDTH, visual != "normal")
    for name, shape in {"conv_A": (4, VISION_WIDTH), "conv_B": (TEXT_WIDTH, 4)}.items():
        weights[f"module.adapter_proj.{name}.weight"] = torch.randn(shape)
        weights[f"module.adapter_proj.{name}.bias"] = torch.randn(shape[0])
    weights["module.adapter_modality_embedding.weight"] = torch.randn(2, TEXT_WIDTH)
    values = {"adapter_dim": r, "adapter_scale": 0.5, "temperature": 5.0, "hidden_proj": 4}
    values.update(adapter_type="block" if block else "attn", visual_adapter_type=visual)
    return {"model": weights, "args": argparse.Namespace(**{**values, **args})}


def convert(content, tmp_path, **options):
    torch.save(content, tmp_path / "checkpoint-0.pth")
    return convert_checkpoint(tmp_path / "checkpoint-0.pth", TEXT, VISION, tmp_path / "out", **options)


@pytest.fixture(scope="module", params=["light", "full"])
def folder(request, tmp_path_factory):
    output = tmp_path_factory.mktemp("converted") / request.param
    assert convert_checkpoint(CHECKPOINT, TEXT, VISION, output, full=request.param == "full") == (output, False)
    assert (output / "model.safetensors").exists() == (request.param == "full")
    assert sorted(path.name for path in (output / "mma").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    return output


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForImageTextToText, AutoModelForCausalLM])
def test_auto_classes_give_the_reference_logits(folder, auto_class):
    model = auto_class.from_pretrained(folder)
    assert isinstance(model, LavinForConditionalGeneration) and not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        for batches, side in BATCHES.values():
            for rows in batches:
                inputs, places = inputs_of(rows, side, model.config.image_token_id)
                logits = model(**inputs).logits
                for j, i in enumerate(rows):
                    torch.testing.assert_close(logits[j, places[j]], EXPECTED[f"{i}.logits"], atol=1e-5, rtol=0)
        table = model.routing_table()
        for i in range(CASE["samples"]):
            torch.testing.assert_close(table[:, int(i in WITH_IMAGE)], EXPECTED[f"{i}.router"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_training_goes_on_with_the_reference_loss_and_gradients(folder, side):
    model = AutoModel.from_pretrained(folder, mma={}).eval()
    assert isinstance(model, LavinPeftModel)
    inputs, _ = inputs_of([0, 1, 2, 3], side, model.config.image_token_id)
    tokens = [int((EXPECTED[f"{i}.labels"][1:] != CASE["label_ignore"]).sum()) for i in range(CASE["samples"])]
    loss = model(**inputs).loss
    expected = sum(EXPECTED[f"{i}.loss"] * tokens[i] for i in range(CASE["samples"])) / sum(tokens)
    assert abs(loss.item() - expected.item()) < 1e-5
    (loss * sum(tokens)).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == len(load_file(folder / "mma" / "adapter_model.safetensors"))
    for name, parameter in trained.items():
        gradient = from_reference(name, lambda key: EXPECTED[f"grad.{key}"])
        assert (parameter.grad - gradient).norm() / gradient.norm().clamp_min(1e-12) < 1e-4, name


def test_light_folder_names_the_base(tmp_path):
    convert_checkpoint(CHECKPOINT, TEXT, VISION, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_checkpoint"] == {"name": str(TEXT), "revision": None}
    assert config["vision_checkpoint"] == {"name": str(VISION), "revision": None}
    assert str(tmp_path) not in (tmp_path / "out" / "mma" / "adapter_config.json").read_text()


def test_processor_is_written_where_there_is_a_tokenizer(tmp_path):
    text = shutil.copytree(TEXT, tmp_path / "text")
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *"abcdefgh"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(text)
    folder, written = convert_checkpoint(CHECKPOINT, text, VISION, tmp_path / "out", preprocessing="clip")
    assert written
    processor, model = AutoProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder)
    assert isinstance(processor, LavinProcessor)
    assert processor.image_token_id == model.config.image_token_id
    assert processor.num_image_tokens == model.config.num_image_tokens == 2
    assert processor.image_processor.do_center_crop


def test_stored_arguments_count_and_each_can_be_overridden(tmp_path):
    folder, _ = convert(released(r=4, groups=4), tmp_path)
    config = json.loads((folder / "mma" / "adapter_config.json").read_text())
    assert [config[key] for key in ("r", "groups", "scale", "router_temperature")] == [4, 4, 0.5, 5.0]
    wrong = {"adapter_dim": 3, "hidden_proj": 9, "adapter_type": "block", "visual_adapter_type": "normal"}
    right = {"adapter_dim": 4, "hidden_proj": 4, "adapter_type": "attn", "visual_adapter_type": "router"}
    shutil.rmtree(folder)
    given = {"groups": 2, "temperature": 7.0, "adapter_scale": 2.0, "vision_feature_layers": [2, 8], **right}
    folder, _ = convert({**released(r=4), "args": argparse.Namespace(**wrong)}, tmp_path, **given)
    config = json.loads((folder / "mma" / "adapter_config.json").read_text())
    assert [config[key] for key in ("r", "groups", "scale", "router_temperature")] == [4, 2, 2.0, 7.0]
    assert AutoModel.from_pretrained(folder).config.vision_feature_layers == [2, 8]


def test_without_stored_arguments_what_the_weights_do_not_show_must_be_given(tmp_path):
    content = {"model": released(block=True, visual="router_block")["model"]}
    with pytest.raises(ValueError, match="does not say its --adapter-scale, --temperature"):
        convert(content, tmp_path)
    folder, _ = convert(content, tmp_path, temperature=10.0, adapter_scale=1.0)
    config = json.loads((folder / "mma" / "adapter_config.json").read_text())
    assert [config[key] for key in ("r", "groups", "text_mlp", "vision_mlp", "vision_router")] == [8, 2, 1, 1, 1]


def test_mlp_adapters_land_in_front_of_the_mlps(tmp_path):
    content = released(block=True, visual="router_block")
    folder, _ = convert(content, tmp_path)
    model, weights = AutoModel.from_pretrained(folder), content["model"]
    for tower, stem in (
        (model.model.language_model.layers, "layers.1"),
        (model.model.vision_tower.encoder.layers, "backbone.visual.transformer.resblocks.1"),
    ):
        for kind, module in (("attn", tower[1].self_attn), ("mlp", tower[1].mlp)):
            for expert, name in enumerate(("conv_B", "conv_D")):
                stored = weights[f"module.{stem}.adapter_{kind}.{name}.weight"].squeeze(-1)
                assert torch.equal(module.adapter_up["mma"].weight[expert], stored)
            assert torch.equal(
                module.adapter_router["mma"].bias, weights[f"module.{stem}.adapter_{kind}.expert_weights.bias"]
            )


def test_half_precision_weights_become_float32(tmp_path):
    content = released()
    content["model"] = {key: value.half() for key, value in content["model"].items()}
    folder, _ = convert(content, tmp_path)
    assert {t.dtype for t in load_file(folder / "mma" / "adapter_model.safetensors").values()} == {torch.float32}


def test_vision_adapters_without_a_router_are_converted_with_a_warning(tmp_path, caplog):
    folder, _ = convert(released(visual="normal"), tmp_path)
    assert "leaves out the residual" in caplog.text
    layer = AutoModel.from_pretrained(folder).model.vision_tower.encoder.layers[0].self_attn
    assert layer.adapter_up["mma"].weight.shape[0] == 1 and not len(layer.adapter_router)


def llama_names(model) -> dict:
    return {"layers.0.attention.wq.weight": torch.zeros(2, 2), "tok_embeddings.weight": torch.zeros(2, 2)}


def without(*names):
    def change(content):
        for name in names:
            del content["model"][name]
        return content

    return change


def another_width(content):
    content["model"] = {
        k: v[..., :-4] if k.endswith("expert_weights.weight") else v for k, v in content["model"].items()
    }
    return content


MISFITS = {
    "missing": (
        without("module.layers.0.adapter_attn.conv_D.bias", "module.adapter_proj.conv_B.bias"),
        r"missing: adapter_proj\.conv_B\.bias\n  missing: layers\.0\.adapter_attn\.conv_D\.bias",
    ),
    "unexpected": (
        lambda content: {**content, "model": {**content["model"], "module.adapter_query.weight": torch.zeros(2)}},
        r"unexpected: adapter_query\.weight",
    ),
    "other base": (
        another_width,
        r"shape: layers\.0\.adapter_attn\.expert_weights\.weight: \(2, 28\) in the file, \(2, 32\) in this base",
    ),
    "deeper base": (
        lambda content: {
            **content,
            "model": {k.replace("layers.2.", "layers.5."): v for k, v in content["model"].items()},
        },
        r"unexpected: layers\.5\.adapter_attn\.conv_A\.weight",
    ),
    "stored rank": (lambda content: released(adapter_dim=4), r"\(8, 32\) in the file, \(4, 32\) in this base"),
    "unknown type": (lambda content: released(adapter_type="repattn"), "`adapter_type` must be one of attn, block"),
    "no model": (lambda content: {"model": 3}, "holds no dict of weights under `model`"),
    "a list": (lambda content: [torch.zeros(2)], "holds no dict of weights under `model`"),
    "nothing of LaVIN": (lambda content: {"model": {"fc.weight": torch.zeros(2)}}, "holds no weights of LaVIN"),
    "no weights at all": (lambda content: {"model": {}}, "nothing at all"),
    "LLaMA as Meta writes it": (llama_names, "a language model's own weights.*--text-model"),
    "LLaMA as transformers does": (
        lambda content: {"model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2)},
        "a language model's own weights.*--text-model",
    ),
    "out of range": (lambda content: released(temperature=0.0), "`router_temperature` must be greater than 0"),
    "unsafe": (
        lambda content: {**content, "args": shutil.rmtree},
        "holds a shutil.rmtree, which is not read for safety",
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_checkpoint_that_does_not_fit(tmp_path, name):
    change, message = MISFITS[name]
    with pytest.raises(ValueError, match=message):
        convert(change(released()), tmp_path)
    assert not (tmp_path / "out").exists()


FILES = {
    "text": (lambda path: path.write_text("hello"), "is no PyTorch checkpoint, or cut.*`checkpoint-N.pth`"),
    "empty": (lambda path: path.write_bytes(b""), "is no PyTorch checkpoint, or cut"),
    "cut": (lambda path: path.write_bytes(CHECKPOINT.read_bytes()[:4000]), "is no PyTorch checkpoint, or cut"),
    "safetensors": (lambda path: save_file({"a": torch.zeros(2)}, path), "is a safetensors file"),
    "json": (lambda path: path.write_text('{"peft_type": "LORA"}'), "is a JSON file.*PEFT"),
    "folder": (lambda path: path.mkdir(), "is a folder"),
}


@pytest.mark.parametrize("name", FILES)
def test_file_of_another_kind(tmp_path, name):
    make, message = FILES[name]
    make(tmp_path / "file.pth")
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(tmp_path / "file.pth", TEXT, VISION, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_arguments(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(OSError, match="nothing.pth"):
        convert_checkpoint(tmp_path / "nothing.pth", TEXT, VISION, out)
    with pytest.raises(OSError, match="The text checkpoint .*no-text.* cannot be reached.*name a folder"):
        convert_checkpoint(CHECKPOINT, tmp_path / "no-text", VISION, out)
    with pytest.raises(ValueError, match="no vision tower"):
        convert_checkpoint(CHECKPOINT, TEXT, TEXT, out)
    with pytest.raises(ValueError, match="no language model"):
        convert_checkpoint(CHECKPOINT, VISION, VISION, out)
    with pytest.raises(ValueError, match="vision_feature_layers"):
        convert_checkpoint(CHECKPOINT, TEXT, VISION, out, vision_feature_layers=[9])
    assert not out.exists()


def test_an_adapter_that_is_there_is_not_overwritten(tmp_path):
    folder, _ = convert_checkpoint(CHECKPOINT, TEXT, VISION, tmp_path / "out")
    before = os.stat(folder / "mma" / "adapter_model.safetensors").st_mtime_ns
    with pytest.raises(ValueError, match="is a LaVIN with weights"):
        convert_checkpoint(CHECKPOINT, TEXT, VISION, folder)
    assert os.stat(folder / "mma" / "adapter_model.safetensors").st_mtime_ns == before
