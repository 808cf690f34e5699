"""The model: towers, image tokens, routing, and every way of running one forward."""

import pytest
import torch
from conftest import (
    TEXTS,
    VISION_SHAPE,
    VOCAB,
    batch,
    difference,
    pixels,
    tiny_config,
    tiny_lavin,
)
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CLIPConfig,
    CLIPVisionConfig,
    LlamaConfig,
    MambaConfig,
)
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from lavin import LavinConfig, LavinForConditionalGeneration, MMAConfig
from lavin.modeling_lavin import LavinPreTrainedModel


TOLERANCE = 2e-5  # of logits of size 10 or so, in float32


@pytest.fixture(scope="module")
def model():
    return tiny_lavin()


def logits(model, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model, *losses) -> dict[str, torch.Tensor]:
    """Gradients of the sum of some losses, each of its own forward, all forwards before the backward."""
    model.zero_grad()
    sum(loss() for loss in losses).backward()
    return {name: p.grad.clone() for name, p in trained(model).items() if p.grad is not None}


def in_vocabulary(inputs, config):
    """Labels must not hold the image token's id, which may lie after the vocabulary."""
    return inputs["input_ids"].masked_fill(inputs["input_ids"] == config.image_token_id, -100)


def assert_same_gradients(got, expected, tolerance=1e-5):
    assert set(got) == set(expected)
    for name, gradient in expected.items():
        error = (got[name] - gradient).norm() / gradient.norm().clamp_min(1e-8)
        assert error < tolerance, (name, error)


# Configuration


def test_config_takes_dicts_configs_and_whole_checkpoints_and_round_trips(tmp_path):
    vision, text = CLIPVisionConfig(**VISION_SHAPE), LlamaConfig(vocab_size=VOCAB)
    whole = CLIPConfig(vision_config=VISION_SHAPE)
    for v in (vision, vision.to_dict(), whole):
        for t in (text, text.to_dict()):
            config = LavinConfig(vision_config=v, text_config=t)
            assert (config.vision_config.hidden_size, config.text_config.vocab_size) == (16, VOCAB)
    assert LavinConfig().num_image_tokens == 6  # every 4th of 24 blocks
    config = tiny_config("llama3", image_token_id=70)
    config.save_pretrained(tmp_path)
    again = LavinConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert again.tie_word_embeddings and again.image_token_id == 70 and again.num_image_tokens == 2


@pytest.mark.parametrize(
    "field, value",
    [
        ("vision_feature_layers", [0]),
        ("vision_feature_layers", [5]),
        ("vision_feature_layers", []),
        ("vision_feature_layers", [4, 2]),
        ("vision_feature_layers", [2, 2]),
        ("projector_hidden_size", 0),
        ("image_token_id", -1),
    ],
)
def test_config_refuses_values_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"`{field}`"):
        tiny_config(**{field: value})


# Towers


@pytest.mark.parametrize("text", TEXTS)
def test_text_only_equals_the_base_language_model_bit_for_bit(text):
    model = tiny_lavin(text, adapter=False)
    base = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    base.get_decoder().load_state_dict(model.model.language_model.state_dict())
    base.lm_head.load_state_dict(model.lm_head.state_dict())
    inputs = batch(model.config, (0, 0, 0))
    assert torch.equal(logits(model, **inputs), logits(base, **inputs))
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert embedding.shape == base.get_input_embeddings().weight.shape
    assert head.shape == base.lm_head.weight.shape
    assert (embedding is head) == bool(model.config.text_config.tie_word_embeddings)


def test_several_images_come_in_order_and_each_matters(model):
    inputs = batch(model.config, (2, 1))
    out = logits(model, **inputs)
    swapped = {**inputs, "pixel_values": inputs["pixel_values"][[1, 0, 2]]}
    assert difference(logits(model, **swapped)[0], out[0]) > 1e-2
    assert difference(logits(model, **swapped)[1], out[1]) == 0


def test_class_token_taps_and_mean_of_patches():
    for vision, read in (("clip", lambda s: s[:, 0]), ("siglip", lambda s: s.mean(1))):
        model = tiny_lavin(vision=vision, adapter=False)
        with torch.no_grad():
            states = model.model.vision_tower(pixels(2), output_hidden_states=True).hidden_states
            leaves = model.model.vision_tower.encoder.layers[3](states[3], None)  # no norm after the last block
            images = model.get_image_features(pixels(2))
        expected = torch.stack([read(states[2]), read(leaves)], dim=1)
        assert torch.equal(images.tapped_states, expected)
        assert torch.equal(images.pooler_output, model.model.multi_modal_projector(expected))
    assert "SigLIP" in type(model.model).get_image_features.__doc__


def test_vision_router_is_per_token_of_each_image(model):
    together = model.get_image_features(pixels(3)).pooler_output
    for i in range(3):
        assert difference(model.get_image_features(pixels(3)[i : i + 1]).pooler_output, together[i : i + 1]) < 1e-5


@pytest.mark.parametrize("text", ["llama2", "qwen3", "gpt2"])
def test_routing_table_is_what_a_sequence_of_one_computes(text):
    """Against a straightforward loop: each modality alone, weights read off before each attention."""
    model = tiny_lavin(text)
    table = model.routing_table()
    assert table.shape == (3, 2, 2)
    torch.testing.assert_close(table.sum(-1), torch.ones(3, 2))
    assert difference(table[:, 0], table[:, 1]) > 1e-2  # modalities differ
    assert difference(table[0], table[1]) > 1e-3  # layers differ
    routing = model.model.routing
    for modality in (0, 1):
        seen = []

        def read(layer, args, kwargs, seen=seen):
            x = args[0] if args else kwargs["hidden_states"]
            name, config = layer.active_name, layer.adapter_config[layer.active_name]
            seen.append(torch.softmax(layer.adapter_router[name](x[:, 0]) / config.router_temperature, -1))

        hooks = [layer.register_forward_pre_hook(read, with_kwargs=True) for layer in routing.layers]
        routing.weights = {layer.key: w[modality][None] for layer, w in zip(routing.layers, table, strict=True)}
        with torch.no_grad():
            embeds = model.model.modality_embedding(torch.tensor([[modality]]))
            model.model.language_model(inputs_embeds=embeds)
        routing.weights = None
        for hook in hooks:
            hook.remove()
        assert difference(torch.cat(seen), table[:, modality]) < 1e-6


def test_initialisation_is_that_of_the_method_and_apart_from_torch_rng():
    a, b = tiny_lavin(adapter=False, seed=0).model, tiny_lavin(adapter=False, seed=1).model
    assert not torch.equal(
        a.language_model.layers[0].mlp.up_proj.weight, b.language_model.layers[0].mlp.up_proj.weight
    )
    for name in ("multi_modal_projector", "modality_embedding"):
        for x, y in zip(getattr(a, name).parameters(), getattr(b, name).parameters(), strict=True):
            assert torch.equal(x, y)
    source = tiny_lavin("gpt2", adapter=False, text_config={"n_embd": 256})
    state = {k: v for k, v in source.state_dict().items() if "projector" not in k and "modality" not in k}
    model = LavinForConditionalGeneration.from_pretrained(None, config=source.config, state_dict=state).model
    assert torch.equal(model.multi_modal_projector.linear_2.weight, source.model.multi_modal_projector.linear_2.weight)
    for linear in (model.multi_modal_projector.linear_1, model.multi_modal_projector.linear_2):
        bound = (6 / (linear.in_features + linear.out_features)) ** 0.5
        assert linear.bias.abs().max() == 0
        assert 0.95 * bound < linear.weight.abs().max() <= bound
    assert abs(model.modality_embedding.weight.std().item() - 1) < 0.1


# Image tokens and modality


@pytest.mark.parametrize(
    "images, given", [((1, 0), 0), ((1, 1), 1), ((0, 0), 1), ((1, 0), 2)], ids=["none", "few", "unasked", "many"]
)
def test_number_of_images_must_match_the_tokens(model, images, given):
    inputs = {**batch(model.config, images), "pixel_values": pixels(given) if given else None}
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        model(**inputs)


def test_one_kind_of_input_and_of_image_at_a_time(model):
    inputs = batch(model.config, (1,))
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        model(**inputs, inputs_embeds=torch.zeros(1, 3, 32))
    with pytest.raises(ValueError, match="both pixel_values and mm_encoder_outputs"):
        model(**inputs, mm_encoder_outputs={"image": model.get_image_features(inputs["pixel_values"])})
    with pytest.raises(ValueError, match="modality_ids"):
        model(inputs_embeds=torch.zeros(1, 3, 32), pixel_values=pixels(1))


def test_mm_encoder_outputs_and_inputs_embeds_equal_ids(model):
    inputs = batch(model.config, (1, 0, 2), side="right")
    expected = logits(model, **inputs)
    pictures = inputs.pop("pixel_values")
    with torch.no_grad():
        images = model.get_image_features(pictures)
        assert difference(logits(model, **inputs, mm_encoder_outputs={"image": images}), expected) == 0
        ids = inputs.pop("input_ids")
        embeds = model.get_input_embeddings()(ids.masked_fill(ids == model.config.image_token_id, 0))
        embeds[ids == model.config.image_token_id] = images.pooler_output.flatten(0, 1)
    by_embeds = logits(model, **inputs, inputs_embeds=embeds, modality_ids=torch.tensor([1, 0, 1]))
    assert difference(by_embeds, expected) < TOLERANCE
    assert difference(logits(model, **inputs, inputs_embeds=embeds), expected) > 1e-2  # without ids: text


def test_outputs(model):
    inputs = batch(model.config, (1, 0), side="right")
    out = model(**inputs, output_hidden_states=True, labels=in_vocabulary(inputs, model.config))
    assert out.image_hidden_states.shape == (1, 2, 32) and len(out.hidden_states) == 4
    assert out.loss.ndim == 0 and out.past_key_values.get_seq_length() == inputs["input_ids"].shape[1]
    as_tuple = model(**inputs, return_dict=False)
    assert torch.equal(as_tuple[0], out.logits)


@pytest.mark.parametrize("text", TEXTS)
def test_loss_is_a_mean_over_what_trainers_count(text):
    model = tiny_lavin(text)
    inputs = batch(model.config, (1, 0), side="right")
    labels = in_vocabulary(inputs, model.config).masked_fill(inputs["attention_mask"] == 0, -100)
    out = model(**inputs, labels=labels)
    flat = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    assert abs(model(**inputs, labels=labels, num_items_in_batch=17).loss.item() - flat.item() / 17) < 1e-4


@pytest.mark.parametrize(
    "keep",
    [1, 3, torch.tensor([0, 2, -1]), torch.tensor([[0, 1], [3, 2]]), "mask"],
    ids=["one", "three", "positions", "positions of each row", "mask"],
)
def test_logits_to_keep(model, keep):
    inputs = batch(model.config, (1, 0), side="right")
    full = logits(model, **inputs)
    if isinstance(keep, int):
        expected = full[:, -keep:]
    elif isinstance(keep, str):
        keep = inputs["attention_mask"].bool()
        expected = full[keep]
    elif keep.ndim == 2:
        expected = torch.stack([full[i, positions] for i, positions in enumerate(keep)])
    else:
        expected = full[:, keep]
    assert difference(logits(model, **inputs, logits_to_keep=keep), expected) < TOLERANCE


# Ways to run attention


def test_flags():
    cls = LavinForConditionalGeneration
    for flag in ("_supports_flash_attn", "_supports_sdpa", "_supports_flex_attn", "_supports_attention_backend"):
        assert getattr(cls, flag) is True and flag in vars(LavinPreTrainedModel)
    assert cls._can_compile_fullgraph and cls.supports_gradient_checkpointing
    assert cls.main_input_name == "input_ids" and cls.base_model_prefix == "model"


@pytest.mark.parametrize("name", ["model.multi_modal_projector.linear_1", "model.multi_modal_projector.linear_2"])
def test_quantisation_leaves_the_projector_alone(name):
    """Whatever list of modules the user passes, and in quantisers that take subclasses of `nn.Linear` too."""
    keep = tiny_lavin(adapter=False)._keep_in_fp32_modules
    assert not should_convert_module(name, HfQuantizer.get_modules_to_not_convert(None, ["lm_head"], keep))
    assert should_convert_module("model.vision_tower.encoder.layers.0.mlp.fc1", list(keep))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("text", ["llama2", "qwen3", "gpt2"])
def test_half_precision_follows_float32(text, dtype):
    full, half = tiny_lavin(text), tiny_lavin(text)
    half.model.language_model.to(dtype)
    half.model.vision_tower.to(dtype)
    half.lm_head.to(dtype)
    inputs = batch(full.config, (1, 0))
    out = logits(half, **inputs)
    assert out.dtype == dtype
    where = inputs["attention_mask"].bool()
    expected = logits(full, **inputs)[where]
    assert difference(out[where], expected) < 0.1 * expected.abs().max()
    loss_inputs = {**inputs, "labels": in_vocabulary(inputs, full.config)}
    half.train()(**loss_inputs).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained(half).values())


def test_from_pretrained_dtype_keeps_what_is_trained_in_float32():
    source = tiny_lavin(adapter=False)
    model = LavinForConditionalGeneration.from_pretrained(
        None, config=source.config, state_dict=source.state_dict(), dtype=torch.bfloat16
    )
    assert model.model.language_model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    assert model.model.vision_tower.dtype == torch.bfloat16
    assert model.model.multi_modal_projector.linear_1.weight.dtype == torch.float32
    assert model.model.modality_embedding.weight.dtype == torch.float32
    assert logits(model, **batch(model.config, (1, 0))).dtype == torch.bfloat16


def test_device_map_acts_on_the_whole(tmp_path):
    source = tiny_lavin(adapter=False)
    inputs = batch(source.config, (1, 0))
    parts = {"model.vision_tower": "cpu", "model.multi_modal_projector": "cpu", "model.modality_embedding": "cpu"}
    split = {**parts, "model.language_model": "cpu", "lm_head": "disk"}
    for device_map in ("cpu", {"": "cpu"}, split):
        model = LavinForConditionalGeneration.from_pretrained(
            None,
            config=source.config,
            state_dict=source.state_dict(),
            device_map=device_map,
            offload_folder=str(tmp_path),
        )
        assert device_map is not split or model.hf_device_map == split
        assert difference(logits(model.eval(), **inputs), logits(source, **inputs)) < TOLERANCE


@pytest.mark.parametrize("part", ["model.language_model", "model.vision_tower", "lm_head"])
def test_an_adapter_on_a_base_that_lies_on_the_disk(tmp_path, part):
    """accelerate brings the base's weights for each forward; the adapter's own are where it computes."""
    source = tiny_lavin()
    source.save_pretrained(tmp_path / "full", full=True)
    parts = ("vision_tower", "multi_modal_projector", "modality_embedding", "language_model")
    device_map = {**{f"model.{name}": "cpu" for name in parts}, "lm_head": "cpu", part: "disk"}
    model = LavinForConditionalGeneration.from_pretrained(
        tmp_path / "full", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert model.get_submodule(part).state_dict() and any(p.is_meta for p in model.get_submodule(part).parameters())
    for images in ((1, 0), (0, 0)):
        inputs = batch(source.config, images)
        assert difference(logits(model.eval(), **inputs), logits(source.eval(), **inputs)) < TOLERANCE


def test_one_process_without_images_skips_the_vision_tower(model):
    calls = []
    handle = model.model.vision_tower.register_forward_hook(lambda *a: calls.append(1))
    model.train()(**batch(model.config, (0,)))
    model.eval()
    handle.remove()
    assert not calls


# Architectures


def test_an_architecture_without_attention_lists_candidates():
    config = LavinConfig(
        vision_config=CLIPVisionConfig(**VISION_SHAPE),
        vision_feature_layers=[2],
        text_config=MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4),
    )
    model = LavinForConditionalGeneration(config)
    with pytest.raises(ValueError, match=r"Candidates in `layers`: \['mixer', 'norm'\]") as error:
        get_peft_model(model, MMAConfig())
    assert "target_modules" in str(error.value) and "MambaModel" in str(error.value)


@pytest.mark.parametrize("skip", [None, ["lm_head"]], ids=["as it comes", "user's own list"])
def test_a_4_bit_base_trains(skip):
    pytest.importorskip("bitsandbytes")
    source = tiny_lavin(adapter=False, text_config={"hidden_size": 64, "intermediate_size": 128})
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=skip,
    )
    model = LavinForConditionalGeneration.from_pretrained(
        None, config=source.config, state_dict=source.state_dict(), quantization_config=nf4, dtype=torch.bfloat16
    )
    peft = get_peft_model(model, MMAConfig(), adapter_name="mma").train()
    assert type(model.model.language_model.layers[0].self_attn.base_layer.q_proj).__name__ == "Linear4bit"
    assert type(model.model.vision_tower.encoder.layers[0].mlp.fc1).__name__ == "Linear4bit"
    assert {p.dtype for p in trained(peft).values()} == {torch.float32}
    inputs = batch(model.config, (1, 0), side="right")
    peft(**inputs, labels=in_vocabulary(inputs, model.config)).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained(peft).values())
    with pytest.raises(ValueError, match="quantised base cannot be folded"):
        peft.merge_modality("text")


def test_image_tokens_among_the_labels_are_no_targets():
    model = tiny_lavin("llama2").eval()
    ids, pixels = image_batch(model)
    labels = ids.clone()
    hidden = labels.masked_fill(labels == model.config.image_token_id, -100)
    with torch.no_grad():
        loss = model(input_ids=ids, pixel_values=pixels, labels=labels).loss
        assert torch.equal(loss, model(input_ids=ids, pixel_values=pixels, labels=hidden).loss)


def image_batch(model):
    image = torch.full((1, model.config.num_image_tokens), model.config.image_token_id)
    text = torch.tensor([[5, 6, 7, 8]])
    size = model.config.vision_config.image_size
    return torch.cat([text, image, text], dim=1), torch.rand(1, 3, size, size)


def test_modality_ids_and_a_missing_table_are_explained():
    model = tiny_lavin("llama2", adapter=False).eval()
    with pytest.raises(ValueError, match="one per row"):
        model(input_ids=torch.tensor([[5, 6]]), modality_ids=torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="No MMA adapter"):
        model.routing_table()
