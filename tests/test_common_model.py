"""
transformers' model and training tests by their own names, on tiny LaVINs. `make conformance` runs the originals.

| not here | because |
|---|---|
| batching, padding, eager and SDPA, device maps | tests/test_modeling.py |
| compilation, checkpointed gradients | tests/test_gradients.py |
| folders, shards, missing tensors | tests/test_folders.py |
| feed-forward chunking, position resizing, problem types, encoder-decoders, experts, audio, video | LaVIN has none |
| reentrant checkpointing | turned into the non-reentrant kind, with a message |
"""

import copy
import inspect

import pytest
import torch
from conftest import PAD, VOCAB, batch, difference, fill, tiny_config, tiny_lavin, tiny_peft
from safetensors.torch import load_file, save_file

from lavin import LavinForConditionalGeneration, LavinModel


CLASSES = (LavinModel, LavinForConditionalGeneration)
INSIDE = {"image_token_id": VOCAB - 3}  # an image token that has a row in the embedding
each_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


@pytest.fixture(scope="module")
def model():
    return tiny_lavin()


def build(cls, text="llama2", **overrides):
    torch.manual_seed(0)
    return cls(tiny_config(text, **overrides)).eval()


def forward(model, **inputs):
    with torch.no_grad():
        return model(**inputs)


# Saving and loading


@each_class
def test_save_load(cls, tmp_path):
    model = build(cls)
    inputs = batch(model.config, (1, 0))
    expected = forward(model, **inputs)[0]
    for folder in (tmp_path / "first", tmp_path / "second"):
        model.save_pretrained(folder)
        assert (folder / "config.json").is_file()
        assert (folder / "generation_config.json").is_file() == model.can_generate()
        model = cls.from_pretrained(folder).eval()
        assert torch.equal(forward(model, **inputs)[0], expected)


@each_class
def test_from_pretrained_no_checkpoint(cls):
    model = build(cls)
    state = model.state_dict()
    loaded = cls.from_pretrained(None, config=model.config, state_dict=state).state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items())


@each_class
@pytest.mark.parametrize("name", ["torch_dtype", "dtype"])
@pytest.mark.parametrize("dtype", ["float16", torch.bfloat16, "auto"], ids=str)
def test_bc_torch_dtype(cls, name, dtype, tmp_path):
    build(cls).bfloat16().save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path, **{name: dtype})
    expected = torch.float16 if dtype == "float16" else torch.bfloat16
    assert next(loaded.base_model.language_model.parameters()).dtype == expected


@each_class
def test_keep_in_fp32_modules(cls, tmp_path):
    """What is trained stays float32; every name that says so is one of this class."""
    model = build(cls)
    model.save_pretrained(tmp_path)
    assert not model._keep_in_fp32_modules & model._keep_in_fp32_modules_strict
    for dtype in (torch.float16, torch.bfloat16):
        for name, parameter in cls.from_pretrained(tmp_path, dtype=dtype).named_parameters():
            trained = "multi_modal_projector" in name or "modality_embedding" in name
            assert parameter.dtype == (torch.float32 if trained else dtype), name


@pytest.mark.parametrize("text", ["llama2", "llama3", "gpt2"])
def test_load_save_without_tied_weights(text, tmp_path):
    model = build(LavinForConditionalGeneration, text)
    tied = model.config.tie_word_embeddings
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    model.save_pretrained(tmp_path)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) != tied
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied


def test_tied_head_has_a_tp_plan_entry():
    assert build(LavinForConditionalGeneration, "llama3").tp_plan["lm_head"] == "colwise_gather_output"


def test_correct_missing_keys(tmp_path):
    """A folder that lacks weights is refused, unless the caller asks what is missing and so will look."""
    build(LavinModel).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lack weights of the model: lm_head\.weight"):
        LavinForConditionalGeneration.from_pretrained(tmp_path)
    loaded, info = LavinForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"}
    assert difference(loaded.get_input_embeddings().weight, build(LavinModel).get_input_embeddings().weight) == 0


def test_can_load_ignoring_mismatched_shapes(tmp_path):
    build(LavinForConditionalGeneration).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"][:-1].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((RuntimeError, ValueError), match=r"lm_head|other shapes"):
        LavinForConditionalGeneration.from_pretrained(tmp_path)
    loaded = LavinForConditionalGeneration.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert loaded.lm_head.weight.shape == (VOCAB, 32) and loaded.lm_head.weight.isfinite().all()


# Initialisation


@each_class
def test_can_init_all_missing_weights(cls):
    """What no checkpoint gives is as the constructor makes it, buffers included, though the model starts on meta."""
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in cls(tiny_config()).parameters())
    built = build(cls)
    own = ("multi_modal_projector", "modality_embedding")
    given = {name: tensor for name, tensor in built.state_dict().items() if not any(part in name for part in own)}
    loaded = cls.from_pretrained(None, config=tiny_config(), state_dict=given)
    state, expected = loaded.state_dict(), built.state_dict()
    assert state.keys() == expected.keys() and len(given) < len(expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    buffers = dict(loaded.named_buffers())
    assert all(torch.equal(buffers[name], buffer) for name, buffer in built.named_buffers())
    drawn = cls.from_pretrained(None, config=tiny_config(), state_dict={}).state_dict()
    for name, tensor in expected.items():  # the towers' own way, which differs from part to part
        assert tensor.numel() < 256 or drawn[name].std() / tensor.std() == pytest.approx(1, rel=0.3), name


# Outputs


@each_class
def test_forward_signature(cls):
    parameters = inspect.signature(cls.forward).parameters
    assert list(parameters)[:4] == ["self", "input_ids", "pixel_values", "attention_mask"]
    (others,) = parameters["kwargs"].annotation.__args__  # read by trainers and tests
    assert {"output_attentions", "output_hidden_states"} <= others.__annotations__.keys()


def test_determinism(model):
    inputs = batch(model.config, (1, 0, 2))
    assert torch.equal(forward(model, **inputs).logits, forward(model, **inputs).logits)


@each_class
def test_model_outputs_equivalence(cls):
    model = build(cls)
    inputs = batch(model.config, (1, 0))
    named, plain = (forward(model, **inputs, output_hidden_states=True, return_dict=kind) for kind in (True, False))
    assert isinstance(plain, tuple) and len(plain) == len(named.to_tuple())
    assert torch.equal(plain[0], named[0])


def test_attention_outputs():
    model = tiny_lavin(adapter=False)
    model.set_attn_implementation("eager")
    inputs = batch(model.config, (1, 0))
    rows, length = inputs["input_ids"].shape
    attentions = forward(model, **inputs, output_attentions=True).attentions
    assert [a.shape for a in attentions] == [(rows, 4, length, length)] * 3
    torch.testing.assert_close(attentions[0].sum(-1)[0], torch.ones(4, length))
    model.config.text_config.output_attentions = True
    assert len(forward(model, **inputs).attentions) == 3


def test_retain_grad_hidden_states_attentions():
    model = tiny_lavin()
    model.set_attn_implementation("eager")
    outputs = model(**batch(model.config, (1, 0)), output_hidden_states=True, output_attentions=True)
    kept = [outputs.hidden_states[0], outputs.hidden_states[-1], outputs.attentions[0]]
    for tensor in kept:
        tensor.retain_grad()
    outputs.logits.square().sum().backward()
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in kept)


@each_class
@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_get_image_features_output(cls, vision):
    """The tower's own hidden states and attentions on request, as for every model with `get_image_features`."""
    model = build(cls, vision=vision)
    model.set_attn_implementation("eager")
    pixel_values = batch(model.config, (1, 1))["pixel_values"]
    with torch.no_grad():
        plain = model.get_image_features(pixel_values)
        full = model.get_image_features(pixel_values, output_hidden_states=True, output_attentions=True)
        as_tuple = model.get_image_features(pixel_values, return_dict=False)
    assert plain.hidden_states is None and plain.attentions is None
    assert len(full.hidden_states) == 5 and len(full.attentions) == 4
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[0], plain.last_hidden_state)
    assert plain.pooler_output.shape == (2, 2, 32)
    assert torch.equal(full.pooler_output, plain.pooler_output)


# Embeddings


def test_inputs_embeds_matches_input_ids():
    """Where the image token has a row, its embedding marks the images' places, and the row's modality."""
    model = tiny_lavin(**INSIDE)
    for images in ((1, 0, 2), (0, 0)):
        inputs = batch(model.config, images)
        input_ids = inputs.pop("input_ids")
        expected = forward(model, input_ids=input_ids, **inputs).logits
        embeds = model.get_input_embeddings()(input_ids)
        assert torch.equal(forward(model, inputs_embeds=embeds, **inputs).logits, expected)
    inputs = batch(model.config, (1,))
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    with pytest.raises(ValueError, match="do not match, tokens: 2, features: 4"):
        model(inputs_embeds=embeds, pixel_values=inputs["pixel_values"].repeat(2, 1, 1, 1))


@pytest.mark.parametrize("text", ["llama2", "llama3"])
def test_resize_tokens_embeddings(text):
    model = tiny_lavin(text)
    inputs = batch(model.config, (1, 0))
    before = forward(model, **inputs).logits
    for size in (VOCAB + 10, VOCAB - 1):
        model.resize_token_embeddings(size, mean_resizing=False)
        assert model.config.get_text_config().vocab_size == size == model.get_output_embeddings().weight.shape[0]
        assert (model.get_input_embeddings().weight is model.lm_head.weight) == (text == "llama3")
        after = forward(model, **inputs).logits
        assert after.shape[-1] == size
        common = min(size, VOCAB)
        torch.testing.assert_close(after[..., :common], before[..., :common])


@each_class
def test_model_get_set_embeddings(cls):
    model = build(cls)
    new = torch.nn.Embedding(VOCAB, 32)
    model.set_input_embeddings(new)
    assert model.get_input_embeddings() is new
    assert (model.get_output_embeddings() is None) == (cls is LavinModel)


# Attention implementations


@each_class
def test_can_set_attention_dynamically_composite_model(cls):
    config = tiny_config()
    config._attn_implementation = {"text_config": "eager", "vision_config": "sdpa"}
    model = cls(config).base_model
    assert model.language_model.config._attn_implementation == "eager"
    assert model.vision_tower.config._attn_implementation == "sdpa"
    model.set_attn_implementation({"text_config": "sdpa", "vision_config": "eager"})
    assert model.language_model.config._attn_implementation == "sdpa"
    assert model.vision_tower.config._attn_implementation == "eager"
    model.set_attn_implementation("eager")
    assert {model.language_model.config._attn_implementation, model.config._attn_implementation} == {"eager"}


def test_internal_model_config_and_subconfig_are_same():
    model = build(LavinForConditionalGeneration)
    assert model.config is model.model.config
    assert model.model.language_model.config is model.config.text_config
    assert model.model.vision_tower.config is model.config.vision_config


# Training


def test_gradient_checkpointing_enable_disable():
    model = tiny_lavin()
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    for tower in (model.model.language_model, model.model.vision_tower):
        assert any(getattr(module, "gradient_checkpointing", False) for module in tower.modules())
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def test_enable_input_require_grads_with_gradient_checkpointing():
    model = tiny_lavin(adapter=False)
    model.requires_grad_(True).train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    inputs = batch(model.config, (1, 0))
    assert model.get_input_embeddings()(inputs["input_ids"].clamp(max=VOCAB - 1)).requires_grad
    model(**inputs).logits.square().sum().backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient.isfinite().all() and gradient.abs().sum() > 0
    model.disable_input_require_grads()


def test_causal_lm_loss_honors_shift_labels(model):
    """Labels that are shifted already, as sequence parallelism gives them, replace `labels`."""
    inputs = batch(model.config, (1, 0))
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= VOCAB, -100)
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    expected = forward(model, **inputs, labels=labels).loss
    assert torch.equal(forward(model, **inputs, labels=torch.zeros_like(labels), shift_labels=shifted).loss, expected)


def test_training_overfit():
    """An adapter on a frozen base learns a fixed batch of rows with and without images, and says it by heart."""
    model = tiny_peft(mma={"r": 8})
    base = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    inputs = batch(model.get_base_model().config, (1, 0))
    labels = inputs["input_ids"].masked_fill((inputs["input_ids"] >= VOCAB) | (inputs["input_ids"] == PAD), -100)
    labels[:, :-2] = -100
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    model.train()
    for _ in range(100):
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0], losses[::15]
    model.eval()
    prompt = {"input_ids": inputs["input_ids"][:, :-2], "attention_mask": inputs["attention_mask"][:, :-2]}
    answer = model.generate(**prompt, pixel_values=inputs["pixel_values"], max_new_tokens=2, do_sample=False)
    assert torch.equal(answer[:, -2:], inputs["input_ids"][:, -2:])
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)


def test_torch_save_load(tmp_path):
    model = fill(tiny_lavin())
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = tiny_lavin(seed=1)
    inputs = batch(model.config, (1, 0))
    assert difference(forward(other, **inputs).logits, forward(model, **inputs).logits) > 1e-2
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(forward(other, **inputs).logits, forward(copy.deepcopy(model), **inputs).logits)
