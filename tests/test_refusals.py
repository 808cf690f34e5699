"""What a folder or an adapter cannot hold is refused, and nothing has changed then."""

import json
import shutil

import pytest
import torch
from conftest import batch, difference, fill, tiny_lavin, tiny_peft
from peft import IA3Config, LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from lavin import LavinForConditionalGeneration, MMAConfig


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_lavin(adapter=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def light(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("light")
    fill(LavinForConditionalGeneration.from_pretrained(base, mma={})).save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model):
    return model.eval()(**batch(model.config, (1, 0))).logits


def state(model):
    switches = [
        (n, m._active_adapter, m._disable_adapters) for n, m in model.named_modules() if "_active_adapter" in vars(m)
    ]
    weights = [(name, p.requires_grad) for name, p in model.named_parameters()]
    return switches, weights, list(model.peft_config), [m.training for m in model.modules()]


CHANGES = {
    "LoRA": lambda m, f: m.add_adapter(LoraConfig(target_modules=["o_proj", "fc1"]), "lora"),
    "IA3": lambda m, f: m.add_adapter(IA3Config(target_modules=["o_proj"], feedforward_modules=[]), "ia3"),
    "a LoRA folder": lambda m, f: m.load_adapter(f, adapter_name="lora"),
    "a LoRA's config": lambda m, f: m.load_adapter(
        peft_config=LoraConfig(target_modules=["o_proj"]), adapter_state_dict={}, adapter_name="lora"
    ),
    "two at once": lambda m, f: m.set_adapter(["mma", "other"]),
    "an unknown one": lambda m, f: m.set_adapter("none"),
    "groups that divide the text's width only": lambda m, f: m.add_adapter(
        MMAConfig(r=32, groups=32), "wide"
    ),
    "no such modules": lambda m, f: m.add_adapter(MMAConfig(target_modules=["nothing"]), "bad"),
    "by PEFT": lambda m, f: inject_adapter_in_model(MMAConfig(r=32, groups=32), m, "wide"),
    "weights of another": lambda m, f: m.load_adapter(
        peft_config=MMAConfig(), adapter_state_dict={"x": torch.zeros(1)}, adapter_name="bad"
    ),
    "a path as name": lambda m, f: m.add_adapter(MMAConfig(), "/tmp/evil"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_after_an_error_the_model_is_what_it_was(light, tmp_path, name):
    lora = tiny_lavin(adapter=False)
    lora.add_adapter(LoraConfig(target_modules=["o_proj"]), "default")
    get_peft_model(tiny_lavin(adapter=False), LoraConfig(target_modules=["o_proj"])).save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(light)
    model.add_adapter(MMAConfig(r=2), "other")
    model.set_adapter("mma")
    model.eval()
    before, expected = state(model), logits(model)
    with pytest.raises(ValueError):
        CHANGES[name](model, tmp_path)
    assert state(model) == before
    assert torch.equal(logits(model), expected)


def test_another_type_beside_mma_says_what_to_do(light):
    model = AutoModel.from_pretrained(light)
    with pytest.raises(
        ValueError, match=r"has an MMA adapter \(mma\), beside which no LoraConfig.*delete_adapter\('mma'\)"
    ):
        model.add_adapter(LoraConfig(target_modules=["o_proj"]), "lora")
    model.delete_adapter("mma")
    model.add_adapter(LoraConfig(target_modules=["o_proj"]), "lora")


def test_switching_to_what_only_half_of_the_layers_have_changes_nothing():
    model = tiny_lavin(adapter=False)
    model.add_adapter(LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights=False), "lora")
    model.add_adapter(MMAConfig(), "mma")
    fill(model)
    before, expected = state(model.eval()), logits(model)
    with pytest.raises(ValueError, match="lora not found"):
        model.set_adapter("lora")
    assert state(model) == before and torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    "name", ["/tmp/evil", "../evil", "a/b", "..", "a.b", "a b", "x\0y", "language_model", "layers"]
)
def test_names_of_adapters(light, base, name):
    model = AutoModel.from_pretrained(light)
    for add in (
        lambda: model.load_adapter(light, adapter_name=name),
        lambda: model.add_adapter(MMAConfig(), name),
        lambda: get_peft_model(tiny_lavin(adapter=False), MMAConfig(), adapter_name=name),
    ):
        with pytest.raises(ValueError, match="cannot name an adapter"):
            add()
    assert list(model.peft_config) == ["mma"]


@pytest.mark.parametrize("multiple", [None, 16])
def test_a_resized_embedding_is_saved_whole(base, tmp_path, multiple):
    peft = fill(LavinForConditionalGeneration.from_pretrained(base, mma={}))
    model = peft.get_base_model()
    model.resize_token_embeddings(70, pad_to_multiple_of=multiple)
    size = 70 if multiple is None else 80
    with torch.no_grad():
        model.get_input_embeddings().weight[64:].normal_()
    for save in (lambda f: peft.save_pretrained(f, full=False), lambda f: model.save_pretrained(f, full=False)):
        with pytest.raises(ValueError, match="embed_tokens.weight has another shape.*full=True"):
            save(tmp_path / "light")
    assert not (tmp_path / "light").exists()
    peft.save_pretrained(tmp_path / "whole")
    again = AutoModel.from_pretrained(tmp_path / "whole")
    assert again.lm_head.weight.shape[0] == again.config.text_config.vocab_size == size
    ids = torch.tensor([[1, 5, 66, 69]])
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    assert torch.equal(logits(again), logits(model))
    answer = again.generate(ids, max_new_tokens=20, do_sample=True, top_k=0, temperature=50.0, eos_token_id=None)
    assert again.config.image_token_id not in answer
    # From there on it is named by that folder, and light again.
    more = LavinForConditionalGeneration.from_pretrained(tmp_path / "whole", mma={})
    more.save_pretrained(tmp_path / "more")
    assert not (tmp_path / "more" / "model.safetensors").exists()
    assert torch.equal(logits(AutoModel.from_pretrained(tmp_path / "more")), logits(model))


def test_layers_that_were_taken_out_are_not_lost(base, tmp_path):
    peft = LavinForConditionalGeneration.from_pretrained(base, mma={})
    del peft.get_base_model().model.language_model.layers[-1]
    with pytest.raises(ValueError, match="another shape than the checkpoint"):
        peft.get_base_model().save_pretrained(tmp_path / "light", full=False)


def test_a_trained_embedding_is_not_resized(base):
    for name in ("embed_tokens", "lm_head"):
        peft = LavinForConditionalGeneration.from_pretrained(base, mma={"modules_to_save": [name]})
        with pytest.raises(ValueError, match="resize before it is added"):
            peft.get_base_model().resize_token_embeddings(70)


def test_variants_are_refused(base, light, tmp_path):
    peft = LavinForConditionalGeneration.from_pretrained(light, mma={})
    model = peft.get_base_model()
    for call in (
        lambda: model.save_pretrained(tmp_path / "x", full=True, variant="fp16"),
        lambda: model.save_pretrained(tmp_path / "x", full=False, variant="fp16"),
        lambda: peft.save_pretrained(tmp_path / "x", variant="fp16"),
        lambda: AutoModel.from_pretrained(base, variant="fp16"),
        lambda: AutoModel.from_pretrained(light, variant="fp16"),
        lambda: LavinForConditionalGeneration.from_vision_text_pretrained("v", "t", variant="fp16"),
    ):
        with pytest.raises(ValueError, match="have no `variant`"):
            call()
    assert not (tmp_path / "x").exists()
    AutoModel.from_pretrained(base, variant=None)


def test_weighted_adapters_are_refused():
    with pytest.raises(ValueError, match="cannot be mixed by weights.*`set_adapter"):
        tiny_peft().add_weighted_adapter(["mma"], [1.0], "mixed")


def test_subfolder_of_an_adapter_is_taken(light, tmp_path):
    copy = shutil.copytree(light, tmp_path / "copy")
    shutil.copytree(copy / "mma", copy / "second")
    weights = load_file(copy / "mma" / "adapter_model.safetensors")
    save_file({key: value * 0.5 for key, value in weights.items()}, copy / "second" / "adapter_model.safetensors")
    found = []
    for where in ({"subfolder": "second"}, {"adapter_kwargs": {"subfolder": "second"}}):
        model = AutoModel.from_pretrained(light)
        model.load_adapter(copy, adapter_name="second", **where)
        found.append(logits(model))
    assert torch.equal(*found) and difference(found[0], logits(AutoModel.from_pretrained(light))) > 1e-2
    with pytest.raises(ValueError, match="not a `subfolder`"):
        LavinForConditionalGeneration.from_pretrained(light, subfolder="mma")


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "mma/adapter_config.json"])
def test_brackets_without_end(light, tmp_path, file):
    copy = shutil.copytree(light, tmp_path / "copy")
    (copy / file).write_text("[" * 100_000)
    with pytest.raises(ValueError, match=f"{file.rpartition('/')[2]} cannot be read"):
        LavinForConditionalGeneration.from_pretrained(copy)


def test_an_adapter_at_the_root(base, light, tmp_path):
    for folder in (base, light):
        copy = shutil.copytree(folder, tmp_path / folder.name)
        (copy / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
        with pytest.raises(ValueError, match="adapter_config.json at its root.*Move it"):
            AutoModel.from_pretrained(copy)
