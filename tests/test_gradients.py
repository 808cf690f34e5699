"""Gradients under checkpointing and several forwards, ranks without images, copies, and compiled graphs."""

import copy
import io
import logging
import os
import subprocess
import sys

import pytest
import torch
from conftest import (
    batch,
    difference,
    pixels,
    row,
    tiny_lavin,
)
from test_modeling import TOLERANCE, assert_same_gradients, gradients, in_vocabulary, logits, trained
from transformers import (
    DynamicCache,
    StaticCache,
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "text, backend", [("llama2", "eager"), ("llama2", "aot_eager"), ("qwen2", "aot_eager"), ("gpt2", "aot_eager")]
)
def test_compiles_as_one_graph(text, backend):
    model = tiny_lavin(text, mma={"dropout": 0.0})
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for images in ((1, 2), (0, 0)):
        inputs = batch(model.config, images, side="right")
        where = inputs["attention_mask"].bool()
        assert difference(logits(compiled, **inputs)[where], logits(model, **inputs)[where]) < TOLERANCE
    if backend == "eager":
        return
    model.train()
    inputs = batch(model.config, (1, 2), side="right")
    inputs["labels"] = in_vocabulary(inputs, model.config)
    expected = gradients(model, lambda: model(**inputs).loss)
    assert_same_gradients(gradients(model, lambda: compiled(**inputs).loss), expected, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_compiles_with_a_cache(kind):
    model = tiny_lavin()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids, pictures = row(model.config, 1)[None], pixels()

    def decode(step):
        cache = StaticCache(config=model.config.text_config, max_cache_len=24) if kind == "static" else DynamicCache()
        first = logits(model, input_ids=ids, pixel_values=pictures, past_key_values=cache)
        return torch.cat([first[:, -1:], logits(step, input_ids=torch.tensor([[5]]), past_key_values=cache)], 1)

    assert difference(decode(compiled), decode(model)) < TOLERANCE


@pytest.mark.slow
def test_compiled_code_sees_a_changed_weight():
    model = tiny_lavin()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    inputs = batch(model.config, (0,))
    before = logits(model, **inputs)
    assert difference(logits(compiled, **inputs), before) < TOLERANCE
    with torch.no_grad():
        model.model.modality_embedding.modules_to_save["mma"].weight.mul_(-3)
    after = logits(compiled, **inputs)
    assert difference(after, before) > 1e-3
    assert difference(after, logits(model, **inputs)) < TOLERANCE


def adapted(text="llama2", checkpointing=None, **kwargs):
    model = tiny_lavin(text, mma={"dropout": 0.0}, **kwargs).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    return model


@pytest.mark.parametrize("text", ["llama2", "qwen2", "qwen3", "mistral", "gpt2"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(text, reentrant, caplog):
    plain = adapted(text)
    inputs = batch(plain.config, (1, 0, 2), side="right")
    inputs["labels"] = in_vocabulary(inputs, plain.config)
    expected = gradients(plain, lambda: plain(**inputs).loss)
    assert len(expected) == len(trained(plain))
    for part in ("adapter_router", "modality_embedding", "multi_modal_projector", "vision_tower", "language_model"):
        assert any(part in name and gradient.abs().max() > 1e-6 for name, gradient in expected.items()), part
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING):
        model = adapted(text, reentrant)
    assert ("use_reentrant=False" in caplog.text) == reentrant
    blocks = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    assert blocks
    calls = []
    handle = model.model.routing.layers[0].base_layer.register_forward_hook(lambda *a: calls.append(1))
    assert_same_gradients(gradients(model, lambda: model(**inputs).loss), expected)
    handle.remove()
    assert len(calls) == 3  # the routing pass once, the forward, and its recomputation
    model.gradient_checkpointing_disable()
    assert_same_gradients(gradients(model, lambda: model(**inputs).loss), expected)


@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_two_forwards_before_one_backward(checkpointing):
    model = adapted(checkpointing=checkpointing)
    losses = []
    for images, seed in (((1, 1), 0), ((0, 0), 5), ((0, 1), 9)):
        inputs = batch(model.config, images, side="right", seed=seed)
        inputs["labels"] = in_vocabulary(inputs, model.config)
        losses.append(lambda inputs=inputs: model(**inputs).loss)
    apart = [gradients(model, loss) for loss in losses]
    summed = {name: sum(g[name] for g in apart if name in g) for name in set().union(*apart)}
    assert_same_gradients(gradients(model, *losses), summed)


def test_two_forwards_with_different_adapters_before_one_backward():
    """A recomputation must see the routing of its own forward even when another adapter is active by then."""
    model = adapted(checkpointing=False)
    inputs = batch(model.config, (1,))
    inputs["labels"] = in_vocabulary(inputs, model.config)
    expected = gradients(model, lambda: model(**inputs).loss)
    model.zero_grad()
    loss = model(**inputs).loss
    with torch.no_grad():
        model(**batch(model.config, (0, 0)))
    loss.backward()
    assert_same_gradients({n: p.grad for n, p in trained(model).items()}, expected)


def test_training_an_all_frozen_model_says_what_to_do():
    model = tiny_lavin(adapter=False).requires_grad_(False).train()
    with pytest.raises(ValueError, match=r"mma=\{\}"):
        model(**batch(model.config, (0,)))
    with torch.no_grad():
        model(**batch(model.config, (0,)))


def test_data_parallel_is_refused():
    model = tiny_lavin()
    model.model._is_replica = True
    with pytest.raises(ValueError, match="accelerate launch"):
        model(**batch(model.config, (0,)))


RANK = """
import torch, torch.distributed as dist, torch.multiprocessing as mp, os, sys
sys.path.insert(0, {tests!r})
from conftest import tiny_lavin, batch

def run(rank):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT={port!r}, RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = tiny_lavin(mma={{"dropout": 0.0}}).train()
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *a: calls.append(1))
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    inputs = batch(model.config, (1,) if rank == 0 else (0,))
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
    ddp(**inputs, labels=labels).loss.backward()
    assert calls == [1], (rank, calls)
    gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    assert gradients.isfinite().all()
    model.eval()(**batch(model.config, (0,)))
    assert calls == [1], "inference skips the tower"
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(run, nprocs=2)
    print("both ranks done")
"""


@pytest.mark.slow
def test_a_rank_without_images_runs_the_vision_tower_too(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(RANK.format(tests=os.path.dirname(__file__), port=str(29500 + os.getpid() % 400)))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=180)
    assert "both ranks done" in done.stdout, done.stderr[-2000:]


def change_in_place(model):
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "adapter_router" in n and "language" in n).mul_(-2)


def test_deepcopy_and_pickle():
    model = tiny_lavin()
    inputs = batch(model.config, (1, 0))
    expected = logits(model, **inputs)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert difference(logits(other, **inputs), expected) == 0
        assert other.model.routing is not model.model.routing
        change_in_place(other)
        assert difference(logits(other, **inputs), expected) > 1e-4
        assert difference(logits(model, **inputs), expected) == 0


def test_a_copy_of_a_checkpointed_model_has_its_own_routing():
    model = adapted(checkpointing=False)
    other = copy.deepcopy(model)
    inputs = batch(model.config, (1, 0), side="right")
    inputs["labels"] = in_vocabulary(inputs, model.config)
    expected = gradients(model, lambda: model(**inputs).loss)
    change_in_place(model)
    assert_same_gradients(gradients(other, lambda: other(**inputs).loss), expected)
