"""Hundreds of calls in one process: memory stays flat, and so does the number of tensors that live."""

import gc
import random

import psutil
import pytest
import torch
from faults import chat, folder, happened, inputs_of  # noqa: F401
from PIL import Image

from lavin.recipes.load import load_model


# To look at every object that lives wakes one of torch's that is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.distributed.reduce_op.:FutureWarning")
AREA = "soak"
WORDS = "what is this red green number of the sides and where does it stand".split()


def living() -> tuple[int, int]:
    """Tensors that live, and the process's memory in bytes."""
    gc.collect()
    tensors = sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())
    return tensors, psutil.Process().memory_info().rss


@pytest.mark.slow
def test_500_generate_calls_of_mixed_shapes(folder):  # noqa: F811
    """Rows, lengths, images, ways of decoding and second turns on a kept cache, all mixed."""
    model, processor = load_model(folder, "cpu")
    draw = random.Random(0)
    picture = Image.linear_gradient("L").resize((28, 28))
    measured = []
    for call in range(560):
        rows = [
            chat(" ".join(draw.choices(WORDS, k=draw.randint(0, 25))), *[picture] * draw.choice((0, 0, 1, 2)))
            for _ in range(draw.choice((1, 1, 2, 5)))
        ]
        inputs = inputs_of(processor, rows, padding=True)
        way = draw.choice(({}, {"num_beams": 2}, {"do_sample": True}, {"cache_implementation": "static"}))
        asked = {"max_new_tokens": draw.randint(1, 6), "return_dict_in_generate": call % 3 == 0, **way}
        output = model.generate(**inputs, **asked)
        if call % 3 == 0 and not way:
            again = torch.cat([output.sequences, output.sequences[:, -2:]], dim=1)
            mask = torch.cat([inputs["attention_mask"], torch.ones(len(rows), again.shape[1])], dim=1)
            mask = mask[:, : again.shape[1]].long()
            model.generate(
                input_ids=again, attention_mask=mask, past_key_values=output.past_key_values, max_new_tokens=2
            )
        if call == 250:
            model.disable_adapters()
        if call == 260:
            model.enable_adapters()
        if call in (59, 309, 559):  # after a warm-up: allocators and caches fill once
            del output, inputs
            measured.append(living())
    (tensors, memory), _, (tensors_after, memory_after) = measured
    assert tensors_after - tensors <= 5, measured
    assert memory_after - memory < 16 * 2**20, measured
    grown = max(0, memory_after - memory) / 2**20
    happened(
        AREA, "500 `generate` calls of mixed shapes", f"{tensors_after - tensors} more tensors, {grown:.1f} MB more"
    )


@pytest.mark.slow
def test_100_adapters_loaded_and_deleted(folder):  # noqa: F811
    model, _ = load_model(folder, "cpu")
    ids = torch.tensor([[1, 5, 6, 7]])
    expected = model.generate(input_ids=ids, max_new_tokens=3)
    measured = []
    for cycle in range(120):
        name = f"other{cycle % 7}"
        model.load_adapter(folder, adapter_name=name)
        assert model.active_adapters() == [name]
        model.generate(input_ids=ids, max_new_tokens=2)
        model.set_adapter("mma")
        model.delete_adapter(name)
        if cycle in (19, 119):
            assert list(model.peft_config) == ["mma"]
            measured.append((*living(), len(model.state_dict())))
    (tensors, memory, entries), (tensors_after, memory_after, entries_after) = measured
    assert tensors_after - tensors <= 5 and entries_after == entries, measured
    assert memory_after - memory < 16 * 2**20, measured
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=3), expected)
    grown = max(0, memory_after - memory) / 2**20
    happened(AREA, "100 adapters loaded and deleted", f"{tensors_after - tensors} more tensors, {grown:.1f} MB more")
