"""The PEFT type `MMA`: its mathematics, its start, and everything PEFT users do with an adapter."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TEXTS, batch, difference, pixels, tiny_lavin, tiny_peft
from peft import PeftConfig, get_peft_model
from peft.utils import PeftType
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer

import lavin
from lavin import LavinConfig, LavinForConditionalGeneration, MMAConfig, MMAModel


TOLERANCE = 2e-5
PARTS = ("adapter_down", "adapter_up", "adapter_router", "multi_modal_projector", "modality_embedding")


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def layers_of(model, tower="language_model"):
    return [m for n, m in model.named_modules() if hasattr(m, "adapter_down") and tower in n]


# Configuration


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 0},
        {"groups": 0},
        {"groups": 3},
        {"router_temperature": 0},
        {"router_temperature": -1},
        {"dropout": -0.1},
        {"dropout": 1.0},
    ],
    ids=str,
)
def test_fields_out_of_range(fields):
    (name,) = fields
    with pytest.raises(ValueError, match=f"`{name}` must be"):
        MMAConfig(**fields)


def test_groups_must_divide_the_width():
    with pytest.raises(ValueError, match="`groups`=7 does not divide the width"):
        tiny_peft(mma={"r": 14, "groups": 7})


def test_every_field_has_a_help_text():
    inherited = {f.name for f in dataclasses.fields(PeftConfig)}
    own = [f for f in dataclasses.fields(MMAConfig) if f.name not in inherited]
    assert {"r", "groups", "scale", "router_temperature", "dropout", "target_modules", "text_mlp", "vision_mlp"} < {
        f.name for f in own
    }
    assert "vision_router" in {f.name for f in own}
    for f in own:
        assert len(f.metadata.get("help", "")) > 20, f.name


def test_config_round_trip_holds_nothing_of_this_machine(tmp_path):
    peft = tiny_peft(mma={"r": 4, "vision_mlp": True})
    config = peft.peft_config["mma"]
    config.base_model_name_or_path = str(tmp_path)
    config.save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    assert str(tmp_path) not in text and "transformers_modules" not in text
    again = PeftConfig.from_pretrained(tmp_path)
    assert type(again) is MMAConfig and (again.r, again.vision_mlp) == (4, True)
    assert again.target_modules == config.target_modules


# What it computes


@pytest.mark.parametrize("tower", ["language_model", "vision_tower"])
@pytest.mark.parametrize("fields", [{}, {"groups": 1}, {"groups": 4, "scale": 0.5}, {"r": 2}], ids=str)
def test_adapt_equals_the_formula(tower, fields):
    """Against grouped convolutions, as the paper writes them."""
    layer = layers_of(tiny_peft(mma=fields), tower)[1]
    config, up = layer.adapter_config["mma"], layer.adapter_up["mma"]
    x = torch.randn(3, 5, layer.features)
    a = layer.adapter_down["mma"](x)
    if layer.is_text:
        w = torch.softmax(torch.randn(3, 2), -1)
        layer.routing.weights = {layer.key: w}
        w = w[:, None]
    else:
        w = torch.softmax(layer.adapter_router["mma"](x) / config.router_temperature, -1)
    experts = [
        F.conv1d(a.transpose(1, 2), up.weight[e][..., None], up.bias[e], groups=config.groups).transpose(1, 2)
        for e in (0, 1)
    ]
    expected = x + config.scale * (w[..., :1] * experts[0] + w[..., 1:] * experts[1])
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            assert difference(layer.adapt(x), expected) < 1e-5
    layer.routing.weights = None


def test_both_experts_are_one_product():
    """One product of the sequence with the down map, one with the up maps; in the vision tower one for the router."""

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if function.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm"):
                self.count += out.shape[-2] == 50
            return out

    peft = tiny_peft(mma={"r": 7, "groups": 1})
    for tower, expected in (("language_model", 2), ("vision_tower", 3)):
        layer = layers_of(peft, tower)[0]
        layer.routing.weights = {layer.key: torch.full((1, 2), 0.5)}
        with Products() as products:
            products.count = 0
            layer.adapt(torch.randn(1, 50, layer.features))
        assert products.count == expected
    layer.routing.weights = None


def test_a_language_model_called_alone_says_what_to_call():
    peft = tiny_peft()
    with pytest.raises(RuntimeError, match="call the LavinModel"):
        peft.get_base_model().model.language_model(input_ids=torch.tensor([[1, 5]]))


def test_without_the_vision_router_the_residual_stays():
    peft = tiny_peft(mma={"vision_router": False})
    layer = layers_of(peft, "vision_tower")[0]
    assert not layer.adapter_router and layer.adapter_up["mma"].weight.shape[0] == 1
    x, up = torch.randn(2, 5, layer.features), layer.adapter_up["mma"]
    a = layer.adapter_down["mma"](x)
    expert = F.conv1d(a.transpose(1, 2), up.weight[0][..., None], up.bias[0], groups=2).transpose(1, 2)
    assert difference(layer.adapt(x), x + expert) < 1e-5
    assert layers_of(peft)[0].adapter_router
    inputs = batch(peft.config, (2, 0))
    assert logits(peft, **inputs).isfinite().all()


@pytest.mark.parametrize("text", ["llama2", "qwen3", "gpt2"])
def test_mlp_options(text):
    plain = tiny_peft(text)
    for option, tower, blocks in (("text_mlp", "language_model", 3), ("vision_mlp", "vision_tower", 4)):
        peft = tiny_peft(text, mma={option: True})
        assert len(layers_of(peft, tower)) == 2 * blocks == len(layers_of(plain, tower)) + blocks
        inputs = batch(peft.config, (1, 0))
        assert difference(logits(peft, **inputs), logits(plain, **inputs)) > 1e-3
        if option == "text_mlp":
            assert peft.get_base_model().routing_table().shape == (6, 2, 2)
            keys = [layer.key.split("layers.")[-1] for layer in peft.get_base_model().model.routing.layers]
            assert keys == sorted(keys)


def test_dropout_acts_on_the_modality_tokens_path_and_not_in_eval():
    peft = tiny_peft(mma={"dropout": 0.5})
    model = peft.get_base_model()
    a, b = model.routing_table(), model.routing_table()
    assert torch.equal(a, b)
    model.train()
    a, b = model.routing_table(), model.routing_table()
    assert torch.equal(a[0], b[0]) and difference(a[1:], b[1:]) > 1e-3


# How it starts


def test_a_fresh_adapter_is_the_identity():
    base = tiny_lavin(adapter=False)
    inputs = batch(base.config, (1, 0))
    before = logits(base, **inputs)
    peft = get_peft_model(base, MMAConfig(), adapter_name="mma").eval()
    assert difference(logits(peft, **inputs), before) == 0


def test_initial_weights():
    for tower, layer in (("text", layers_of(fresh())[0]), ("vision", layers_of(fresh(), "vision_tower")[0])):
        down, up, router = layer.adapter_down["mma"], layer.adapter_up["mma"], layer.adapter_router["mma"]
        bound = (6 / (layer.features + 8)) ** 0.5
        assert 0.9 * bound < down.weight.abs().max() <= bound, tower
        assert all(p.abs().max() == 0 for p in (down.bias, up.weight, up.bias))
        assert 0 < router.weight.abs().max() <= layer.features**-0.5 and router.bias.abs().min() > 0


def fresh(text="llama2", **mma):
    return get_peft_model(tiny_lavin(text, adapter=False), MMAConfig(**mma), adapter_name="mma")


START = "sum(p.double().abs().sum().item() for p in peft.parameters() if p.requires_grad)"


def test_the_start_is_the_same_in_every_layout():
    torch.manual_seed(1)
    peft = fresh()
    expected = {n: p.clone() for n, p in trained(peft).items()}
    torch.manual_seed(2)
    state = torch.get_rng_state()
    base = tiny_lavin(adapter=False)
    torch.set_rng_state(state)
    other = get_peft_model(base, MMAConfig(), adapter_name="mma")
    assert torch.equal(torch.get_rng_state(), state)  # nor does it move torch's generator
    assert all(torch.equal(p, expected[n]) for n, p in trained(other).items())
    for mma in ({"init_seed": 1}, {"text_mlp": True}):
        peft = fresh(**mma)
        same = [torch.equal(p, expected[n]) for n, p in trained(peft).items() if n in expected and "down.mma.w" in n]
        assert all(same) if "text_mlp" in mma else not any(same)


@pytest.mark.slow
def test_the_start_is_the_same_in_another_process():
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"from test_mma import fresh\npeft = fresh()\nprint(repr({START}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert float(out.stdout.split()[-1]) == eval(START, {"peft": fresh()}), out.stderr[-1000:]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["get_peft_model", "add_adapter of PEFT", "add_adapter of transformers"])
def test_everything_trained_is_float32(dtype, way):
    model = tiny_lavin(adapter=False).to(dtype)
    if way == "add_adapter of transformers":
        model.add_adapter(MMAConfig(), adapter_name="mma")
    else:
        name = "mma" if way == "get_peft_model" else "first"
        model = get_peft_model(model, MMAConfig(), adapter_name=name)
        if name == "first":
            model.add_adapter("mma", MMAConfig())
            model.set_adapter("mma")
    inputs = batch(model.config, (1, 0), side="right")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    assert all(any(part in n for n in trained(model)) for part in PARTS)
    assert {p.dtype for n, p in model.named_parameters() if "q_proj" in n} == {dtype}
    model.train()(**inputs, labels=labels).loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in trained(model).values())


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_weight_decay_falls_on_matrices_and_not_on_biases(text, vision):
    model = tiny_peft(text, vision, mma={"text_mlp": True, "vision_mlp": True})
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    for name, parameter in trained(model).items():
        assert (name in decayed) == name.endswith("weight"), name
        assert parameter.ndim >= 2 or name.endswith("bias") or "bias" in name


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_what_is_trained(text, vision):
    peft = tiny_peft(text, vision)
    assert all(any(part in n for part in PARTS) and ".mma." in n for n in trained(peft))
    assert len(layers_of(peft)) == 3 and len(layers_of(peft, "vision_tower")) == 4
    assert all(any(part in n for n in trained(peft)) for part in PARTS)


@pytest.mark.parametrize("size, expected", [("7B", 3_781_296), ("13B", 5_390_080)])
def test_trainable_parameters_of_the_published_models(size, expected, capsys):
    width, depth, heads, inner = {"7B": (4096, 32, 32, 11008), "13B": (5120, 40, 40, 13824)}[size]
    text = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, "intermediate_size": inner}
    started = time.perf_counter()
    with torch.device("meta"):
        model = LavinForConditionalGeneration(LavinConfig(text_config={**text, "vocab_size": 32000}))
    peft = get_peft_model(model, MMAConfig(), adapter_name="mma")
    assert sum(p.numel() for p in trained(peft).values()) == expected
    assert peft.get_nb_trainable_parameters()[0] == expected
    peft.print_trainable_parameters()
    assert f"trainable params: {expected:,}" in capsys.readouterr().out
    assert all(p.device.type == "meta" for p in peft.parameters())
    assert time.perf_counter() - started < 60


# The code is imported twice


def test_a_second_import_is_harmless(monkeypatch):
    """As remote code beside the installed package: another module name, other classes, the same files."""
    folder, package = Path(lavin.__file__).parent, "transformers_modules_copy"
    before = PeftType.MMA
    modules = {}
    for name in ("", "tuner_lavin", "configuration_lavin"):
        path = folder / f"{name or '__init__'}.py"
        if not name:
            module = importlib.util.module_from_spec(
                importlib.util.spec_from_loader(package, loader=None, is_package=True)
            )
            module.__path__ = [str(folder)]
        else:
            spec = importlib.util.spec_from_file_location(f"{package}.{name}", path)
            module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, f"{package}.{name}".rstrip("."), module)
        if name:
            spec.loader.exec_module(module)
        modules[name] = module
    copied = modules["tuner_lavin"]
    assert copied.MMAConfig is not MMAConfig and PeftType.MMA is before
    assert copied.MMAConfig().peft_type == PeftType.MMA == "MMA"
    # A config of the one import works with a model of the other.
    peft = get_peft_model(tiny_lavin(adapter=False), copied.MMAConfig(), adapter_name="mma")
    assert type(peft.base_model) is MMAModel and trained(peft)
    assert json.loads(json.dumps(peft.peft_config["mma"].to_dict()))["peft_type"] == "MMA"


# Partitioned weights


def test_no_size_is_read_off_a_base_weight():
    """Under ZeRO-3 a weight's shape is 0 while it is partitioned."""
    model = tiny_lavin(adapter=False)
    for name, parameter in model.named_parameters():
        if "vision_tower" in name or "language_model" in name:
            parameter.data = torch.empty(0)
    peft = get_peft_model(model, MMAConfig(), adapter_name="mma")
    expected = {n: p.shape for n, p in trained(fresh()).items()}
    assert {n: p.shape for n, p in trained(peft).items()} == expected


ZERO3 = """
import os, sys, torch
sys.path.insert(0, {tests!r})
os.environ.update(DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT={port!r}, RANK="0", WORLD_SIZE="1",
                  LOCAL_RANK="0")
import deepspeed
from conftest import tiny_peft, batch
torch.set_num_threads(1)
inputs = {{}}
def run(model, call):
    model.train()
    inputs = batch(model.config, (1, 0), side="right")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    loss = call(**inputs, labels=labels).loss
    return loss
plain = tiny_peft(mma={{"dropout": 0.0}})
expected = run(plain, plain)
expected.backward()
grads = {{n: p.grad for n, p in plain.named_parameters() if p.requires_grad}}
model = tiny_peft(mma={{"dropout": 0.0}})
deepspeed.init_distributed("gloo")
config = {{"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "zero_optimization": {{"stage": 3, "stage3_param_persistence_threshold": 0}}}}
optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
loss = run(model, engine)
assert abs(loss.item() - expected.item()) < 1e-5, (loss, expected)
engine.backward(loss)
from deepspeed.utils import safe_get_full_grad
for n, p in model.named_parameters():
    if p.requires_grad:
        error = (safe_get_full_grad(p) - grads[n]).norm() / grads[n].norm().clamp_min(1e-8)
        assert error < 1e-4, (n, error)
print("same under ZeRO-3")
"""


@pytest.mark.slow
def test_zero_3_gathers_every_adapter_weight(tmp_path):
    """With a threshold of 0 nothing stays whole: a weight that is read past its module's call would be empty."""
    pytest.importorskip("deepspeed")
    script = tmp_path / "zero3.py"
    script.write_text(ZERO3.format(tests=str(Path(__file__).parent), port=str(29900 + time.time_ns() % 90)))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert "same under ZeRO-3" in done.stdout, done.stderr[-3000:]


def test_nothing_warns_in_ordinary_use():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        peft = tiny_peft()
        peft(**batch(peft.config, (1, 0)))
        peft.get_base_model().get_image_features(pixels())


@pytest.mark.parametrize("wrong", [{"r": "8"}, {"r": True}, {"scale": None}, {"groups": 2.0}])
def test_a_field_of_the_wrong_type_is_named(wrong):
    with pytest.raises(ValueError, match=f"`{next(iter(wrong))}` must be a number"):
        MMAConfig(**wrong)
