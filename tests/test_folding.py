"""`merge_modality`: the adapter of one modality folded into a plain language model."""

import pytest
import torch
import torch.nn.functional as F
from conftest import TEXTS, batch, difference, fill, pixels, row, tiny_lavin, tiny_peft
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lavin import MMAConfig


TAKES_BIAS = {name: name != "mistral" for name in TEXTS}
TAKES_MLP_BIAS = {name: name.startswith(("llama", "smollm", "gpt2")) for name in TEXTS}


def shown(model, modality):
    """A prompt of the modality as ids and as embeddings with the image in it, and the adapted model's logits."""
    images = 2 if modality == "image" else 0
    ids = row(model.config, images, 7)[None]
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=pixels(images) if images else None).logits
        embeds = model.get_input_embeddings()(ids.masked_fill(ids == model.config.image_token_id, 0))
        if images:
            features = model.get_image_features(pixels(images)).pooler_output
            embeds[ids == model.config.image_token_id] = features.flatten(0, 1)
    return ids, embeds, expected


@pytest.mark.parametrize("mlp", [False, True], ids=["attention", "attention and MLP"])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("modality", ["text", "image"])
def test_folded_logits(text, modality, mlp):
    peft = tiny_peft(text, mma={"text_mlp": mlp, "scale": 0.7})
    model = peft.get_base_model()
    if not (TAKES_MLP_BIAS if mlp else TAKES_BIAS)[text]:
        with pytest.raises(ValueError, match="cannot take a bias on .*keep the adapter attached"):
            peft.merge_modality(modality)
        return
    ids, embeds, expected = shown(model, modality)
    plain = peft.merge_modality(modality)
    assert type(plain) is type(AutoModelForCausalLM.from_config(model.config.text_config))
    with torch.no_grad():
        assert difference(plain(inputs_embeds=embeds).logits, expected) < 1e-4
        if modality == "text":
            assert difference(plain(input_ids=ids).logits, expected) < 1e-4
    other = peft.merge_modality("image" if modality == "text" else "text")
    assert difference(other(inputs_embeds=embeds).logits, expected) > 1e-2
    with torch.no_grad():  # the model itself stays as it was
        assert torch.equal(shown(model, modality)[2], expected)


@pytest.mark.parametrize("text", ["llama2", "llama3", "qwen2", "qwen3", "gpt2"])
def test_a_folded_model_is_saved_and_loaded_as_any_other(text, tmp_path):
    peft = tiny_peft(text)
    ids, _, expected = shown(peft.get_base_model(), "text")
    peft.merge_modality("text").save_pretrained(tmp_path)
    cls = LlamaForCausalLM if text.startswith("llama") else AutoModelForCausalLM
    plain, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert difference(plain.eval()(input_ids=ids).logits, expected) < 1e-4
    if text.startswith("llama"):
        assert plain.config.attention_bias is True and plain.config.mlp_bias is False
        assert plain.model.layers[0].self_attn.o_proj.bias.abs().max() == 0
    tied = bool(plain.config.tie_word_embeddings)
    assert (
        (plain.lm_head.weight is plain.get_input_embeddings().weight) == tied == (text in ("llama3", "qwen2", "gpt2"))
    )
    assert not [name for name, _ in plain.named_parameters() if "adapter" in name or "base_layer" in name]


def test_a_folded_model_generates_the_same():
    model = tiny_lavin()
    inputs = batch(model.config, (0, 0))
    plain = model.merge_modality("text")
    arguments = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(plain.generate(**inputs, **arguments), model.generate(**inputs, **arguments))


def test_the_active_adapter_is_folded_with_its_modules_to_save():
    peft = tiny_peft(mma={"modules_to_save": ["lm_head"]})
    with torch.no_grad():
        peft.get_base_model().lm_head.modules_to_save["mma"].weight.mul_(3)
    peft.add_adapter("other", MMAConfig(r=2, target_modules=r".*language_model\.layers\.1\.self_attn"))
    fill(peft, "other", 5)
    for name in ("mma", "other"):
        peft.set_adapter(name)
        ids, _, expected = shown(peft.get_base_model().eval(), "text")
        assert difference(peft.merge_modality("text")(input_ids=ids).logits, expected) < 1e-4


def test_half_precision_folds_within_its_own_rounding():
    model = tiny_lavin(adapter=False).to(torch.bfloat16)
    peft = fill(get_peft_model(model, MMAConfig(), adapter_name="mma")).eval()
    ids, _, expected = shown(model, "text")
    plain = peft.merge_modality("text")
    assert plain.dtype == torch.bfloat16
    assert difference(plain(input_ids=ids).logits, expected) < 0.1 * expected.abs().max()


@pytest.mark.parametrize(
    "prepare, modality, message",
    [
        (lambda: tiny_lavin(), "both", "`modality` must be 'text' or 'image'"),
        (lambda: tiny_lavin(adapter=False), "text", "No MMA adapter is active"),
        (lambda: tiny_lavin(mma={"target_modules": r".*vision_tower.*self_attn"}), "text", "No MMA adapter is active"),
    ],
    ids=["modality", "no adapter", "vision only"],
)
def test_what_cannot_be_folded(prepare, modality, message):
    with pytest.raises(ValueError, match=message):
        prepare().merge_modality(modality)


def test_a_map_with_another_adapter_is_not_folded():
    """A LoRA on a map that is folded would be lost; nothing has changed then."""
    model = tiny_lavin(adapter=False)
    lora = LoraConfig(r=4, target_modules=r".*language_model.*\.q_proj", init_lora_weights=False)
    model.add_adapter(lora, adapter_name="lora")
    model.add_adapter(MMAConfig(), adapter_name="mma")
    fill(model).eval()
    inputs = batch(model.config, (1, 0))
    before = model(**inputs).logits
    for fold in (model.fold, lambda: model.merge_modality("text")):
        with pytest.raises(ValueError, match="has another adapter"):
            fold()
    assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("mlp", [False, True], ids=["attention", "attention and MLP"])
@pytest.mark.parametrize("text", TEXTS)
def test_folded_for_both_modalities(text, mlp):
    """One object, mixed rows, every architecture: also those whose maps take no bias."""
    model = tiny_lavin(text, mma={"text_mlp": mlp, "scale": 0.7})
    cases = [batch(model.config, images, side="left") for images in ((1, 0, 2), (0, 0), (1, 1))]
    with torch.no_grad():
        expected = [model(**inputs).logits for inputs in cases]
        assert model.fold() is model and not model.model.routing.layers
        for inputs, logits in zip(cases, expected, strict=True):
            kept = inputs["attention_mask"].bool()
            assert difference(model(**inputs).logits[kept], logits[kept]) < 1e-4
        swapped = model(**cases[1], modality_ids=torch.tensor([1, 1])).logits
        assert difference(swapped, expected[1]) > 1e-2


class Odd(nn.Module):
    """An attention with something more that reads its input."""

    def __init__(self, attention, reads):
        super().__init__()
        self.attention, self.reads = attention, reads
        self.extra, self.norm = nn.Linear(32, 32, bias=False), nn.LayerNorm(32)
        self.gain = nn.Parameter(torch.randn(32))

    def forward(self, hidden_states, **kwargs):
        output, weights = self.attention(hidden_states=hidden_states, **kwargs)
        return output + self.reads(self, hidden_states), weights


ODD = {
    "a further map": (lambda m, x: m.extra(x), None),
    "a map of a copy, flattened": (lambda m, x: m.extra(x.clone().reshape(-1, 32)).view_as(x), None),
    "a map of what is masked": (lambda m, x: m.extra(x * (x.new_ones(x.shape[1]) != 0)[:, None]), "`mul`"),
    "a parameter": (lambda m, x: x * m.gain, "`mul`"),
    "a weight without its module": (lambda m, x: F.linear(x, m.extra.weight), "`linear`"),
    "a norm": (lambda m, x: m.extra(m.norm(x)), "`layer_norm` in norm"),
    "itself": (lambda m, x: x, "`add`"),
    "a part": (lambda m, x: F.pad(x[..., :16], (0, 16)), "`__getitem__`"),
    "other places": (lambda m, x: m.extra(x.transpose(0, 1)).transpose(0, 1), "`transpose`"),
    "earlier places": (lambda m, x: m.extra(x.roll(1, 1)), "`roll`"),
    "its sum": (lambda m, x: x.sum().item(), "`sum`"),
    "a choice": (lambda m, x: m.extra(x) if x[0, 0, 0].item() > 0 else -m.extra(x), "`__getitem__`"),
    "a change in place": (lambda m, x: m.extra(x.mul_(1)), "`mul_`"),
    "a map that reads more": (lambda m, x: m.extra(x) + m.extra(m.gain), "reads other things too"),
}


@pytest.mark.parametrize("name", ODD)
def test_what_reads_the_input_is_found(name):
    reads, refusal = ODD[name]
    model = tiny_lavin(adapter=False)
    layer = model.model.language_model.layers[1]
    layer.self_attn = Odd(layer.self_attn, reads)
    peft = fill(get_peft_model(model, MMAConfig(), adapter_name="mma")).eval()
    inputs = batch(model.config, (1, 0, 2))
    with torch.no_grad():
        expected = model(**inputs).logits
        if refusal is None:
            model.fold()
            kept = inputs["attention_mask"].bool()
            assert difference(model(**inputs).logits[kept], expected[kept]) < 1e-4
            return
        for fold in (model.fold, lambda: peft.merge_modality("text")):
            with pytest.raises(ValueError, match=f"Cannot fold language_model.layers.1.self_attn.*{refusal}"):
                fold()
        assert torch.equal(model(**inputs).logits, expected)


def test_single_maps_are_folded():
    for target in (r".*language_model.*(q_proj|up_proj)", r".*language_model.*down_proj"):
        with torch.no_grad():
            model = tiny_lavin(mma={"target_modules": target})
            inputs = batch(model.config, (1, 0, 2))
            kept, expected = inputs["attention_mask"].bool(), model(**inputs).logits
            ids, _, text = shown(model, "text")
            assert difference(model.merge_modality("text")(input_ids=ids).logits, text) < 1e-4
            assert difference(model.fold()(**inputs).logits[kept], expected[kept]) < 1e-4


def test_a_folded_lavin_answers_200_prompts_alike():
    model = tiny_lavin()
    cases = [batch(model.config, [(i + j) % 3 for j in range(8)], length=3 + i % 7, seed=i) for i in range(25)]
    arguments = {"max_new_tokens": 8, "do_sample": False}
    expected = [model.generate(**inputs, **arguments) for inputs in cases]
    model.fold()
    for inputs, tokens in zip(cases, expected, strict=True):
        assert torch.equal(model.generate(**inputs, **arguments), tokens)
    beams = {**arguments, "num_beams": 3}
    unfolded = tiny_lavin()
    assert torch.equal(model.generate(**cases[0], **beams), unfolded.generate(**cases[0], **beams))


def test_a_folded_lavin_is_for_inference(tmp_path):
    model = tiny_lavin().fold()
    with pytest.raises(ValueError, match="for inference only"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="for inference only"):
        model.train()(**batch(model.config, (1,)))
    with pytest.raises(ValueError, match="for inference only"):
        model.eval().fold()
    for switch in (model.disable_adapters, model.enable_adapters, lambda: model.set_adapter("mma")):
        with pytest.raises(ValueError, match="No adapter loaded"):
            switch()
    with pytest.raises(ValueError, match="for inference only"):
        model.add_adapter(MMAConfig(), adapter_name="other")
    for target in (None, r".*language_model.*self_attn"):
        peft = tiny_peft(mma={"target_modules": target})
        peft.get_base_model().fold()
        with pytest.raises(ValueError, match="for inference only"), peft.disable_adapter():
            pass
        for change in (peft.delete_adapter, peft.set_adapter):
            with pytest.raises(ValueError, match="for inference only"):
                change("mma")
        with pytest.raises(ValueError, match="for inference only"):
            peft.add_adapter("other", MMAConfig())
        with pytest.raises(ValueError, match="for inference only"):
            peft.save_pretrained(tmp_path)
    compiled = torch.compile(tiny_lavin().fold(), backend="eager", fullgraph=True)
    inputs = batch(model.config, (1, 0))
    assert difference(compiled(**inputs).logits, model.eval()(**inputs).logits) < 1e-5
