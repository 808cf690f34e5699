"""
The checks of PEFT's common tester by its own names, on MMA. `make conformance` runs the originals, on LoRA as well.

| not here | because |
|---|---|
| merging, mixed batches, `disable_adapter`, deleting the active adapter, unloading, other ranks | tests/test_mma.py |
| training with and without checkpointing, gradients, weight decay | tests/test_modeling.py, tests/test_mma.py |
| `layers_to_transform`, `bias`, weighted combinations, prompt learning | MMA has none |
"""

import copy
import json

import pytest
import torch
from conftest import batch, difference, fill, tiny_lavin
from peft import (
    PeftConfig,
    PeftModel,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
    set_base_model_state_dict,
)

from lavin import LavinForConditionalGeneration, MMAConfig


# PEFT's saving says that the folder holds an adapter only.
pytestmark = pytest.mark.filterwarnings("ignore:.*get_base_model.*:UserWarning")


@pytest.fixture(scope="module")
def base():
    return tiny_lavin(adapter=False)


def adapted(base, adapter_name="default", seed=7, **mma):
    return fill(get_peft_model(copy.deepcopy(base), MMAConfig(**mma), adapter_name), adapter_name, seed).eval()


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def save(model, folder, **kwargs):
    PeftModel.save_pretrained(model, folder, **kwargs)
    return folder


def weights(model, name="default"):
    return get_peft_model_state_dict(model, adapter_name=name)


def assert_same_weights(got, expected):
    assert got.keys() == expected.keys() and expected
    assert all(torch.equal(got[key], tensor) for key, tensor in expected.items())


def test_model_attr(base):
    model = adapted(base)
    for name in ("save_pretrained", "from_pretrained", "push_to_hub", "generate", "merge_modality"):
        assert callable(getattr(model, name))


def test_adapter_name(base):
    model = adapted(base, "test-adapter")
    assert any(".test-adapter." in name for name, _ in model.named_parameters())
    assert not any(".default." in name for name, _ in model.named_parameters())
    assert model.active_adapters == ["test-adapter"] == list(model.peft_config)


def test_prepare_for_training(base):
    inputs = batch(base.config, (0, 0))
    model = adapted(base)
    assert not model.get_input_embeddings()(inputs["input_ids"]).requires_grad
    prepared = prepare_model_for_kbit_training(copy.deepcopy(base))
    assert not any(parameter.requires_grad for parameter in prepared.parameters())
    model = get_peft_model(prepared, MMAConfig())
    model.enable_input_require_grads()
    assert model.get_input_embeddings()(inputs["input_ids"]).requires_grad


def test_load_model_low_cpu_mem_usage(base, tmp_path):
    """Weights that are about to be loaded are not made first, and all are there afterwards."""
    model, inputs = adapted(base), batch(base.config, (1, 0))
    save(model, tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, low_cpu_mem_usage=True).eval()
    loaded.load_adapter(tmp_path, adapter_name="other", low_cpu_mem_usage=True)
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    for name in ("default", "other"):
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded, **inputs), logits(model, **inputs))
    injected = inject_adapter_in_model(MMAConfig(), copy.deepcopy(base), low_cpu_mem_usage=True)
    assert all(p.is_meta for n, p in injected.named_parameters() if ".adapter_" in n)


@pytest.mark.parametrize("safe", [True, False])
def test_save_pretrained(base, tmp_path, safe):
    named = copy.deepcopy(base)
    named.config._name_or_path = named.name_or_path = "org/lavin-7b"
    model = adapted(named)
    save(model, tmp_path, safe_serialization=safe)
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    file = "adapter_model.safetensors" if safe else "adapter_model.bin"
    assert {file, "adapter_config.json", "README.md"} <= written
    assert not written & {"config.json", "model.safetensors"}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/lavin-7b"
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert_same_weights(weights(loaded), weights(model))


def test_save_pretrained_selected_adapters(base, tmp_path):
    model = adapted(base)
    model.add_adapter("new_adapter", MMAConfig(r=4))
    fill(model, "new_adapter", seed=3)
    save(model, tmp_path / "both")
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "both")
    loaded.load_adapter(tmp_path / "both" / "new_adapter", "new_adapter")
    for name in ("default", "new_adapter"):
        assert_same_weights(weights(loaded, name), weights(model, name))
    save(model, tmp_path / "one", selected_adapters=["new_adapter"])
    assert [path.name for path in (tmp_path / "one").glob("**/adapter_config.json")] == ["adapter_config.json"]
    assert (tmp_path / "one" / "new_adapter" / "adapter_config.json").is_file()
    with pytest.raises(ValueError, match="selected_adapters"):
        save(model, tmp_path / "none", selected_adapters=["default", "does_not_exist"])


def test_save_pretrained_adapter_name_substring(base, tmp_path):
    """A name that is part of another saves just its own weights."""
    model = adapted(base, "mma")
    expected = {}
    for seed, name in enumerate(("mma_b", "b_mma", "mm")):
        model.add_adapter(name, MMAConfig())
        fill(model, name, seed)
    for name in model.peft_config:
        expected[name] = {key: tensor.clone() for key, tensor in weights(model, name).items()}
    save(model, tmp_path)
    for name in expected:
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / name, adapter_name=name)
        assert_same_weights(weights(loaded, name), expected[name])


def test_from_pretrained_config_construction(base, tmp_path):
    model = adapted(base, r=4, dropout=0.1)
    save(model, tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, MMAConfig) and (config.r, config.dropout) == (4, 0.1)
    for trainable in (False, True):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=trainable, config=config)
        assert loaded.peft_config["default"] is config
        assert any(parameter.requires_grad for parameter in loaded.parameters()) == trainable


def test_load_multiple_adapters(base, tmp_path):
    save(adapted(base), tmp_path)
    model = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    result = model.load_adapter(tmp_path, adapter_name="other")
    assert not result.missing_keys and not result.unexpected_keys
    assert list(model.peft_config) == ["default", "other"] and model.active_adapters == ["default"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_generate_half_prec(base, dtype):
    model = adapted(copy.deepcopy(base).to(dtype))
    inputs = batch(base.config, (1, 0))
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert output.shape[1] == inputs["input_ids"].shape[1] + 3


def test_generate_pos_args(base):
    model, inputs = adapted(base), batch(base.config, (0,))
    ways = model.generate(inputs["input_ids"], max_new_tokens=3), model.generate(**inputs, max_new_tokens=3)
    assert torch.equal(*ways)


def test_training_gradient_checkpointing(base):
    """Everything the adapter trains gets a gradient, the base none; the same with PEFT's checkpointing."""
    inputs = batch(base.config, (1, 0))
    found = []
    for checkpointing in (False, True):
        model = adapted(base, dropout=0.0).train()
        if checkpointing:
            model.prepare_model_for_gradient_checkpointing(model)
            model.gradient_checkpointing_enable({"use_reentrant": True})
        model(**inputs).logits.square().sum().backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, name
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-4 * gradient.abs().max().item())


def test_peft_model_device_map(base, tmp_path):
    save(adapted(base), tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, device_map={"": "cpu"})
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}


def test_delete_adapter(base):
    """The last one, too: what is left is the base."""
    model, inputs = adapted(base), batch(base.config, (1, 0))
    model.delete_adapter("default")
    assert model.peft_config == {} and model.active_adapters == []
    assert not any(".default." in name for name, _ in model.named_parameters())
    # PEFT's own wrapper does not run without an adapter, whatever its type.
    assert torch.equal(logits(model.base_model.model, **inputs), logits(base, **inputs))


def test_delete_inactive_adapter(base):
    model, inputs = adapted(base), batch(base.config, (1, 0))
    expected = logits(model, **inputs)
    model.add_adapter("inactive", MMAConfig(r=2))
    fill(model, "inactive", seed=3)
    model.delete_adapter("inactive")
    assert model.active_adapters == ["default"] and list(model.peft_config) == ["default"]
    assert not any(".inactive." in name for name, _ in model.named_parameters())
    assert torch.equal(logits(model, **inputs), expected)


def test_delete_unknown_adapter_raises(base):
    with pytest.raises(ValueError, match="unknown"):
        adapted(base).delete_adapter("unknown")


def test_unload_adapter(base):
    model, inputs = adapted(base), batch(base.config, (1, 0))
    assert difference(logits(model, **inputs), logits(base, **inputs)) > 1e-2
    plain = model.unload()
    assert type(plain) is LavinForConditionalGeneration and not hasattr(plain, "peft_config")
    assert torch.equal(logits(plain, **inputs), logits(base, **inputs))


def test_set_requires_grad(base):
    """`set_requires_grad` reaches one adapter, active or not, its projector and modality embedding included."""
    model = adapted(base)
    model.add_adapter("other", MMAConfig())
    model.set_requires_grad("default", requires_grad=False)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.set_requires_grad("other")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".other." in name} and trained


def test_passing_input_embeds_works(base):
    model, inputs = adapted(base), batch(base.config, (0, 0))
    input_ids = inputs.pop("input_ids")
    embeds = model.get_input_embeddings()(input_ids)
    assert torch.equal(logits(model, inputs_embeds=embeds, **inputs), logits(model, input_ids=input_ids, **inputs))
    assert logits(model, inputs_embeds=embeds).shape[:2] == embeds.shape[:2]


def test_get_base_model_state_dict(base):
    state = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    model = adapted(base)
    found = get_base_model_state_dict(model)
    assert_same_weights(found, state)
    with torch.no_grad():
        for parameter in model.get_base_model().parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    result = set_base_model_state_dict(model, state, strict=False)
    assert not result.missing_keys and not result.unexpected_keys
    assert_same_weights(get_base_model_state_dict(model), state)


def test_init_weights(base, tmp_path):
    """False gives an adapter that is not the identity, from a generator of its own; the default is not written."""
    inputs, expected = batch(base.config, (1, 0)), logits(base, **batch(base.config, (1, 0)))
    models = [get_peft_model(copy.deepcopy(base), MMAConfig(init_weights=False)).eval() for _ in range(2)]
    assert_same_weights(weights(models[0]), weights(models[1]))
    assert difference(logits(models[0], **inputs), expected) > 1e-2
    assert all(value.any() for key, value in weights(models[0]).items() if "adapter_" in key)
    other = get_peft_model(copy.deepcopy(base), MMAConfig(init_weights=False, init_seed=1))
    assert any(not torch.equal(value, weights(models[0])[key]) for key, value in weights(other).items())
    assert torch.equal(logits(get_peft_model(copy.deepcopy(base), MMAConfig()).eval(), **inputs), expected)
    for init_weights in (True, False):
        MMAConfig(init_weights=init_weights).save_pretrained(tmp_path)
        stored = json.loads((tmp_path / "adapter_config.json").read_text())
        assert stored.get("init_weights", True) == init_weights and ("init_weights" in stored) != init_weights
        assert PeftConfig.from_pretrained(tmp_path).init_weights == init_weights
