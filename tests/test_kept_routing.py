"""
The routing table: made in every forward, and once within `generate` and `keep_routing`. Whatever changes between two
forwards, the second equals that of a model which never made one before.
"""

import copy
import threading

import pytest
import torch
from conftest import batch, difference, fill, pixels, tiny_lavin, tiny_peft
from peft import LoraConfig, inject_adapter_in_model
from torch.func import functional_call
from transformers import CompileConfig

from lavin import MMAConfig
from lavin.routing_lavin import CACHE


TOLERANCE = 2e-5


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def greedy(model, new=6, **inputs):
    return model.generate(**inputs, do_sample=False, max_new_tokens=new)


def routers(model):
    return {n: p for n, p in model.named_parameters() if "adapter_router" in n and "language" in n}


def learn(model, optimizer, **options):
    """A step in eval mode: nothing but the weights says that there was one."""
    inputs = batch(model.config, (1, 0), side="right")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    optimizer = optimizer([p for p in model.parameters() if p.requires_grad], lr=0.5, **options)
    with torch.enable_grad():
        model(**inputs, labels=labels).loss.backward()
    logits(model, **inputs)
    optimizer.step()


def in_place(model):
    with torch.no_grad():
        for router in routers(model).values():
            router.mul_(-2)


def by_state_dict(model, assign=False):
    model.load_state_dict(doubled(model), assign=assign)


def by_submodule(model):
    embedding = model.model.modality_embedding.modules_to_save["mma"]
    embedding.load_state_dict({"weight": embedding.weight.detach() * -3}, assign=True)


def doubled(model) -> dict:
    return {k: -2 * v if "adapter_router" in k else v.clone() for k, v in model.state_dict().items()}


def data(model):
    for router in routers(model).values():
        router.data = router.data * -2


def up_map(model):
    with torch.no_grad():
        model.model.routing.layers[-1].adapter_up["mma"].bias.add_(1)


def embedding(model):
    with torch.no_grad():
        model.model.modality_embedding.modules_to_save["mma"].weight.mul_(-1)


def base_weight(model):
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.down_proj.weight.mul_(2)


def temperature(model):
    for layer in model.model.routing.layers:
        layer.adapter_config["mma"].router_temperature = 0.1


def another_module(model):
    layer = model.model.routing.layers[0]
    layer.adapter_router["mma"] = copy.deepcopy(layer.adapter_router["mma"])
    with torch.no_grad():
        layer.adapter_router["mma"].weight.mul_(-2)


CHANGES = {
    "AdamW": lambda model: learn(model, torch.optim.AdamW),
    "fused AdamW": lambda model: learn(model, torch.optim.AdamW, fused=True),
    "fused SGD": lambda model: learn(model, torch.optim.SGD, fused=True),
    "fused Adagrad": lambda model: learn(model, torch.optim.Adagrad, fused=True),
    "foreach AdamW": lambda model: learn(model, torch.optim.AdamW, foreach=True),
    "in place": in_place,
    "state dict": by_state_dict,
    "assigned state dict": lambda model: by_state_dict(model, assign=True),
    "assigned state dict of a submodule": by_submodule,
    "data": data,
    "up map": up_map,
    "modality embedding": embedding,
    "base weight": base_weight,
    "temperature": temperature,
    "another module": another_module,
}


def answers(model, inputs) -> list[torch.Tensor]:
    """All ways in which a table is used: a forward, a cached prefix and a step by hand, `generate`."""
    with torch.no_grad():
        first = model(**inputs, use_cache=True)
        step = model(input_ids=torch.tensor([[5], [7]]), **{CACHE: getattr(first, CACHE)})
    return [first.logits, step.logits, greedy(model, **inputs).float()]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change):
    model = tiny_lavin()
    for parameter in routers(model).values():
        parameter.requires_grad_(True)
    model.model.modality_embedding.requires_grad_(True)
    inputs = batch(model.config, (1, 0))
    before = answers(model, inputs)
    CHANGES[change](model)
    after = answers(model, inputs)
    assert difference(after[0], before[0]) > 1e-4
    for got, expected in zip(after, answers(copy.deepcopy(model), inputs), strict=True):
        assert torch.equal(got, expected)


def test_weights_swapped_by_functional_call():
    model = tiny_lavin()
    inputs = batch(model.config, (1, 0))
    other = copy.deepcopy(model)
    in_place(other)
    plain, expected = logits(model, **inputs), logits(other, **inputs)
    with torch.no_grad():
        got = functional_call(model, dict(other.named_parameters()), kwargs=inputs).logits
    assert difference(expected, plain) > 1e-4
    assert difference(got, expected) < TOLERANCE
    assert torch.equal(logits(model, **inputs), plain)


@pytest.mark.parametrize("order", [(True, False), (False, True)])
def test_autocast_is_seen(order):
    model = tiny_lavin()
    inputs = batch(model.config, (1, 0))

    def run(model, autocast):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return logits(model, **inputs).float(), greedy(model, **inputs)

    for autocast in order:
        for got, expected in zip(run(model, autocast), run(copy.deepcopy(model), autocast), strict=True):
            assert torch.equal(got, expected)


def test_another_adapter_switched_layer_by_layer_is_seen():
    model = tiny_lavin(adapter=False)
    inputs = batch(model.config, (1, 0))
    inject_adapter_in_model(LoraConfig(target_modules=r".*language_model.*(v_proj|o_proj)"), model, "lora")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    inject_adapter_in_model(MMAConfig(), model, "mma")
    fill(model).eval()
    loras = [module for module in model.modules() if hasattr(module, "lora_B")]
    seen = []
    for on in (True, False, True):
        for lora in loras[::2]:
            lora.enable_adapters(on)
        seen.append(logits(model, **inputs))
        assert torch.equal(seen[-1], logits(copy.deepcopy(model), **inputs))
        assert torch.equal(greedy(model, **inputs), greedy(copy.deepcopy(model), **inputs))
    assert difference(seen[0], seen[1]) > 1e-3


# Within `generate` and `keep_routing`


@pytest.fixture
def made(monkeypatch):
    """One entry for each routing pass."""
    made, lavin = [], type(tiny_lavin(adapter=False).model)
    table = lavin.routing_table
    monkeypatch.setattr(lavin, "routing_table", lambda self: made.append(1) or table(self))
    return made


def test_generate_makes_the_table_once(made):
    model = tiny_lavin()
    inputs = batch(model.config, (1, 0))
    for count in (1, 2):
        greedy(model, new=10, **inputs)
        assert len(made) == count
        assert model.model.routing.kept is None and not model.model.routing._by_thread


@torch.no_grad()
def test_a_loop_of_ones_own(made):
    model = tiny_lavin()
    inputs = batch(model.config, (1, 0))
    expected = answers(model, inputs)
    made.clear()
    with model.keep_routing():
        got = answers(model, inputs)
        assert made == [1]
    assert all(difference(a, b) < TOLERANCE for a, b in zip(got, expected, strict=True))
    logits(model, **inputs)
    assert made == [1, 1]


def test_with_gradients_nothing_kept_is_used(made):
    model = tiny_lavin()
    inputs = batch(model.config, (1, 0))
    kept, fresh = logits(model, **inputs), None
    with model.keep_routing():
        kept = logits(model, **inputs)
        fresh = model(**inputs).logits
    assert fresh.requires_grad and difference(kept, fresh) < TOLERANCE
    fresh.sum().backward()


def test_a_switch_of_mma_adapters_is_seen_within():
    base, peft = tiny_lavin(adapter=False), tiny_peft().eval()
    inputs = batch(base.config, (1, 0))
    with peft.keep_routing():
        adapted = logits(peft, **inputs)
        with peft.disable_adapter():
            assert torch.equal(logits(peft, **inputs), logits(base, **inputs))
        assert difference(logits(peft, **inputs), adapted) == 0


def test_inference_mode_then_training():
    model = tiny_lavin()
    inputs = batch(model.config, (1, 0), side="right")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    with torch.inference_mode():
        greedy(model, **inputs)
        with model.keep_routing():
            model(**inputs)
    for mode in (False, True):
        model.train(mode)(**inputs, labels=labels).loss.backward()


def test_an_error_in_generate_leaves_nothing():
    model = tiny_lavin()
    with pytest.raises(ValueError):
        model.generate(batch(model.config, (1,))["input_ids"], max_new_tokens=2)  # its image is missing
    assert model.model.routing.kept is None and model.model.routing.weights is None


@pytest.mark.slow
def test_generate_with_a_compiled_step_uses_the_kept_table(made):
    """On GPUs `generate` compiles its steps over a static cache by itself; here it is made to, on CPU."""
    model = tiny_lavin()
    torch._dynamo.reset()
    inputs = batch(model.config, (1,))
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    for _ in range(2):
        expected = greedy(model, **inputs)
        made.clear()
        got = greedy(model, **inputs, cache_implementation="static", compile_config=config)
        assert torch.equal(got, expected)
        assert made == [1]  # the compiled step has no routing pass in its graph
        embedding(model)


# Threads


def test_threads_share_a_model():
    """Forwards, training and `generate` of several threads, each as if it were alone."""
    model = tiny_lavin(mma={"dropout": 0.0})
    inputs = [batch(model.config, images, seed=seed) for seed, images in enumerate([(1, 0), (0, 0), (2,), (0, 1, 1)])]
    expected = [(logits(model, **i), greedy(model, **i)) for i in inputs]
    wrong = []

    def work(index):
        for _ in range(6):
            got = logits(model, **inputs[index]), greedy(model, **inputs[index])
            if not all(torch.equal(a, b) for a, b in zip(got, expected[index], strict=True)):
                wrong.append(index)

    def train():
        model.gradient_checkpointing_enable()
        alone = gradients()
        for _ in range(6):
            if not all(difference(a, b) < 1e-6 for a, b in zip(gradients(), alone, strict=True)):
                wrong.append("train")

    def gradients():
        trained = [p for p in model.parameters() if p.requires_grad]
        with torch.enable_grad():
            return torch.autograd.grad(model(**inputs[0]).logits.square().mean(), trained)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))] + [threading.Thread(target=train)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and not model.model.routing._by_thread


def test_images_of_two_threads_stay_apart():
    model = tiny_lavin(adapter=False)
    sets = [pixels(n, seed=n) for n in (1, 2, 3)]
    with torch.no_grad():
        expected = [model.get_image_features(images).pooler_output for images in sets]
    wrong = []

    def work(index):
        for _ in range(20):
            with torch.no_grad():
                got = model.get_image_features(sets[index]).pooler_output
            if got.shape != expected[index].shape or not torch.equal(got, expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
