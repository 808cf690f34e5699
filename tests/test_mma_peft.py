"""What PEFT users do with an MMA adapter: save, load, switch, disable, merge; other adapters and modules beside it."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import batch, difference, fill, tiny_config, tiny_lavin, tiny_peft
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_mma import PARTS, TOLERANCE, fresh, layers_of, logits, trained
from transformers import LlamaConfig, LlamaForCausalLM

from lavin import MMAConfig


@pytest.fixture
def pair():
    """A base and a filled adapter on a copy of it."""
    base = tiny_lavin(adapter=False)
    peft = fill(get_peft_model(copy.deepcopy(base), MMAConfig(r=4), adapter_name="mma")).eval()
    return base, peft, batch(base.config, (1, 0, 2))


def save(peft, folder) -> Path:
    """As PEFT itself writes an adapter, with a word on what to call for a whole repository."""
    with pytest.warns(UserWarning, match="get_base_model"):
        PeftModel.save_pretrained(peft, folder)
    return Path(folder)


def test_one_file_holds_all_that_was_trained(pair, tmp_path):
    base, peft, inputs = pair
    folder = save(peft, tmp_path) / "mma"
    assert sorted(p.name for p in folder.glob("*.safetensors")) == ["adapter_model.safetensors"]
    stored = load_file(folder / "adapter_model.safetensors")
    assert sum(t.numel() for t in stored.values()) == sum(p.numel() for p in trained(peft).values())
    assert all(any(part in name for name in stored) for part in PARTS)
    assert any("vision_tower" in name for name in stored) and any("language_model" in name for name in stored)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder, adapter_name="mma").eval()
    assert torch.equal(logits(loaded, **inputs), logits(peft, **inputs))
    assert not trained(loaded)
    trainable = PeftModel.from_pretrained(copy.deepcopy(base), folder, adapter_name="again", is_trainable=True)
    assert len(trained(trainable)) == len(trained(peft))


def test_load_set_and_delete_adapters(pair, tmp_path):
    base, peft, inputs = pair
    folder, expected = save(peft, tmp_path) / "mma", logits(peft, **inputs)
    other = fresh(r=8)
    fill(other, seed=3).eval()
    alone = logits(other, **inputs)
    other.load_adapter(folder, adapter_name="loaded")
    assert difference(logits(other, **inputs), alone) == 0  # loading does not switch
    other.set_adapter("loaded")
    assert difference(logits(other, **inputs), expected) < TOLERANCE
    other.set_adapter("mma")
    assert difference(logits(other, **inputs), alone) == 0
    other.delete_adapter("mma")
    assert difference(logits(other, **inputs), expected) < TOLERANCE
    assert list(other.peft_config) == ["loaded"]
    assert all(list(layer.adapter_down) == ["loaded"] for layer in layers_of(other) + layers_of(other, "vision_tower"))


@pytest.mark.parametrize("deleted, kept", [("one", "two"), ("two", "one")])
def test_two_adapters_with_other_ranks_and_targets(deleted, kept):
    """Each side by side with the other does what it does alone, routing table included."""
    one, two = (
        {"r": 8},
        {"r": 2, "groups": 1, "text_mlp": True, "vision_mlp": True, "exclude_modules": r".*\.0\.self_attn"},
    )
    inputs = batch(tiny_config(), (1, 0, 2))
    expected = {}
    for name, mma, seed in (("one", one, 3), ("two", two, 4)):
        alone = get_peft_model(tiny_lavin(adapter=False), MMAConfig(**mma), adapter_name=name).eval()
        fill(alone, name, seed)
        expected[name] = logits(alone, **inputs), alone.get_base_model().routing_table()
    both = get_peft_model(tiny_lavin(adapter=False), MMAConfig(**one), adapter_name="one").eval()
    both.add_adapter("two", MMAConfig(**two))
    fill(fill(both, "one", 3), "two", 4).eval()
    for name in ("one", "two", "one", "two"):
        both.set_adapter(name)
        out, table = expected[name]
        assert difference(logits(both, **inputs), out) < TOLERANCE, name
        assert difference(both.get_base_model().routing_table(), table) < 1e-6
        assert all(f".{name}." in n for n in trained(both))
    both.set_adapter(deleted)
    with pytest.warns(UserWarning):
        both.delete_adapter(deleted)
    assert both.active_adapters == [kept]
    assert difference(logits(both, **inputs), expected[kept][0]) < TOLERANCE
    with pytest.raises(ValueError, match="one adapter at a time"):
        both.add_adapter("three", MMAConfig())
        both.base_model.set_adapter([kept, "three"])


def test_disable_adapter(pair):
    base, peft, inputs = pair
    expected, adapted = logits(base, **inputs), logits(peft, **inputs)
    assert difference(adapted, expected) > 1e-2
    with peft.disable_adapter():
        assert difference(logits(peft, **inputs), expected) == 0
        assert peft.get_base_model().model.routing.active_layers() == []
    assert difference(logits(peft, **inputs), adapted) == 0
    text = batch(base.config, (0, 0))
    with peft.disable_adapter():
        assert torch.equal(logits(peft, **text), logits(base, **text))


def test_unload_gives_the_base_back(pair):
    base, peft, inputs = pair
    expected = logits(base, **inputs)
    plain = peft.unload()
    assert torch.equal(logits(plain, **inputs), expected)
    assert plain.model.routing.layers == []
    assert set(plain.state_dict()) == set(base.state_dict())
    again = get_peft_model(plain, MMAConfig(), adapter_name="mma")
    assert len(plain.model.routing.layers) == 3 and trained(again)


@pytest.mark.parametrize("call", ["merge_and_unload", "merge_adapter"])
def test_merging_names_the_right_call(pair, call):
    with pytest.raises(ValueError, match=r"cannot serve both modalities.*merge_modality\('text'\)"):
        getattr(pair[1], call)()


def test_mixed_adapter_batches_are_refused(pair):
    base, peft, inputs = pair
    with pytest.raises(ValueError, match="does not mix adapters in one batch"):
        peft(**inputs, adapter_names=["mma", "__base__", "mma"])
    with pytest.raises(ValueError, match="does not mix adapters in one batch"):
        peft.generate(**inputs, adapter_names=["mma", "__base__", "mma"], max_new_tokens=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "norm"])
def test_modules_to_save_in_half_precision(name, dtype):
    """Trained in float32 on a base in half precision, with autocast or without: the same but for rounding."""
    model = tiny_lavin(adapter=False).to(dtype)
    model.add_adapter(MMAConfig(modules_to_save=[name]), adapter_name="mma")
    fill(model).eval()
    trained = [wrapper for key, wrapper in model.named_modules() if key.endswith(name)][0].modules_to_save["mma"]
    assert trained.weight.dtype == torch.float32
    inputs = batch(model.config, (1, 0))
    with torch.no_grad():
        found = model(**inputs).logits
        with torch.autocast("cpu", dtype):
            cast = model(**inputs).logits
        expected = model.float()(**inputs).logits
    assert found.dtype == dtype
    for half in (found, cast):
        assert difference(half.float(), expected) < 0.1 * expected.abs().max()
    model.to(dtype)
    model.disable_adapters()
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


def test_modules_to_save(tmp_path):
    peft = fresh(modules_to_save=["lm_head"])
    assert peft.peft_config["mma"].modules_to_save == ["multi_modal_projector", "modality_embedding", "lm_head"]
    assert any("lm_head" in name for name in trained(peft))
    with torch.no_grad():
        peft.base_model.model.lm_head.modules_to_save["mma"].weight.mul_(2)
    stored = load_file(save(fill(peft), tmp_path) / "mma" / "adapter_model.safetensors")
    assert any("lm_head" in name for name in stored)
    inputs = batch(peft.config, (1, 0))
    loaded = PeftModel.from_pretrained(tiny_lavin(adapter=False), tmp_path / "mma", adapter_name="mma").eval()
    assert torch.equal(logits(loaded, **inputs), logits(peft.eval(), **inputs))


def test_target_modules_by_name_and_by_regex():
    inputs = batch(tiny_config(), (1, 0))
    default = tiny_peft()
    by_name = tiny_peft(mma={"target_modules": ["self_attn"]})
    assert torch.equal(logits(by_name, **inputs), logits(default, **inputs))
    some = tiny_peft(mma={"target_modules": r".*language_model\.layers\.1\.self_attn"})
    assert [layer.key for layer in layers_of(some)] == ["language_model.layers.1.self_attn"]
    assert not layers_of(some, "vision_tower")
    down = tiny_peft(mma={"target_modules": r".*language_model\.layers\..*down_proj"})
    assert layers_of(down)[0].features == 48 and logits(down, **inputs).isfinite().all()
    with pytest.raises(ValueError, match="modules of the two towers"):
        tiny_peft(mma={"target_modules": ["lm_head"]})


def test_it_needs_a_lavin():
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 9}
    llama = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=1))
    with pytest.raises(ValueError, match="MMA needs a LaVIN model"):
        get_peft_model(llama, MMAConfig())


def test_through_pretrained_model():
    base = tiny_lavin(adapter=False)
    inputs = batch(base.config, (1, 0))
    expected = logits(base, **inputs)
    base.add_adapter(MMAConfig(), adapter_name="mma")
    fill(base).eval()
    adapted = logits(base, **inputs)
    assert difference(adapted, expected) > 1e-2
    assert difference(adapted, logits(tiny_peft(), **inputs)) < TOLERANCE
    base.disable_adapters()
    assert difference(logits(base, **inputs), expected) == 0
    base.enable_adapters()
    assert difference(logits(base, **inputs), adapted) == 0
    base.add_adapter(MMAConfig(r=2), adapter_name="other")
    fill(base, "other", 5)
    assert difference(logits(base, **inputs), adapted) > 1e-3
    base.set_adapter("mma")
    assert difference(logits(base, **inputs), adapted) == 0
    base.delete_adapter("other")
    assert difference(logits(base, **inputs), adapted) == 0


def test_lora_beside_it_is_possible_on_the_plain_model():
    """MMA takes nothing from other types: LoRA on a LaVIN works as on any model."""
    model = get_peft_model(tiny_lavin(adapter=False), LoraConfig(target_modules=r".*language_model.*q_proj"))
    assert logits(model, **batch(model.config, (1, 0))).isfinite().all() and trained(model)


def test_a_switch_of_adapters_is_seen_without_gradients(pair):
    """None of these touches a weight."""
    base, peft, inputs = pair
    peft.add_adapter("other", MMAConfig(r=4))
    fill(peft, "other", 9).eval()
    model = peft.get_base_model()
    seen = {}
    for name in ("mma", "other"):
        peft.set_adapter(name)
        seen[name] = logits(peft, **inputs), model.routing_table()
    assert difference(seen["mma"][0], seen["other"][0]) > 1e-3
    peft.set_adapter("mma")
    assert difference(logits(peft, **inputs), seen["mma"][0]) == 0
    assert difference(model.routing_table(), seen["mma"][1]) == 0
    with peft.disable_adapter():
        logits(peft, **inputs)
    peft.delete_adapter("mma")
    assert difference(logits(peft, **inputs), seen["other"][0]) < TOLERANCE
