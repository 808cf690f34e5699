"""
What a row gives does not depend on how its adapter came to be there, on folders or on processes, and without the
adapter it is the base's, bit for bit. Rows and what they must give are those of `test_invariance.py`.
"""

import contextlib
import functools
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import difference, fill, tiny_lavin
from hypothesis import example, given
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from test_invariance import (
    BATCHES,
    MORE_PADDING,
    TEXT,
    answer,
    assert_as_alone,
    examples,
    generate,
    inputs_of,
    lavin,
    logits,
)
from transformers import AutoModel

from lavin import MMAConfig


@functools.cache
def with_and_without_adapter(text: str, way: str):
    """A base, and the same with an adapter attached by PEFT or by transformers."""
    base, model = tiny_lavin(text, adapter=False), tiny_lavin(text, adapter=False)
    if way == "peft":
        model = get_peft_model(model, MMAConfig(), adapter_name="mma")
    else:
        model.add_adapter(MMAConfig(), adapter_name="mma")
    return base, fill(model).eval()


@contextlib.contextmanager
def adapter_off(model):
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            yield
    else:
        model.disable_adapters()
        yield
        model.enable_adapters()


@pytest.mark.parametrize("way", ["peft", "transformers"])
@examples(max_examples=8)
@given(text=TEXT, rows=BATCHES, more=MORE_PADDING, attention=st.sampled_from(["sdpa", "eager"]))
def test_adapter_off_is_bit_equal_to_the_base(way, text, rows, more, attention):
    base, model = with_and_without_adapter(text, way)
    inputs = inputs_of(rows, base.config, more=more)
    for each in (base, model):
        each.set_attn_implementation(attention)
    expected, tokens, adapted = logits(base, inputs), generate(base, inputs), logits(model, inputs)
    assert max(map(difference, adapted, expected)) > 1e-2
    with adapter_off(model):
        assert all(map(torch.equal, logits(model, inputs), expected))
        assert generate(model, inputs) == tokens
    assert all(map(torch.equal, logits(model, inputs), adapted))


STEPS = st.sampled_from(["add", "delete", "switch", "off and on", "generate", "train"])


@examples(max_examples=12)
@given(text=TEXT, rows=BATCHES, first=st.booleans(), steps=st.lists(STEPS, min_size=1, max_size=6))
@example(text="llama2", rows=[(5, -1, 7), (8,)], first=True, steps=["switch", "delete"])
def test_the_adapter_beside_another_is_what_it_is_alone(text, rows, first, steps):
    """Whatever happened to the two of them before, and whichever was there first."""
    names = ("mma", "other") if first else ("other", "mma")
    elsewhere = {"text_mlp": True, "exclude_modules": r".*\.0\.self_attn"}
    configs = {"mma": MMAConfig(), "other": MMAConfig(r=2, groups=1, **elsewhere)}
    peft = get_peft_model(tiny_lavin(text, adapter=False), configs[names[0]], adapter_name=names[0])
    peft.add_adapter(names[1], configs[names[1]])
    fill(fill(peft, "mma"), "other", 5).eval()
    inputs = inputs_of(rows, peft.config)
    for step in steps:
        there = "other" in peft.peft_config
        if step == "add" and not there:
            peft.add_adapter("other", configs["other"])
            fill(peft, "other", 6)
        elif step == "delete" and there:
            peft.delete_adapter("other")  # where it was active, the one that is left becomes so
        elif step == "switch" and there:
            peft.set_adapter("other")
        elif step == "train":
            peft.train()(**inputs)
            peft.eval()
        with peft.disable_adapter() if step == "off and on" else contextlib.nullcontext():
            generate(peft, inputs, new=1)
    if "other" in peft.peft_config:
        peft.set_adapter("mma")
    assert_as_alone(logits(peft, inputs), text, rows)
    assert generate(peft, inputs) == [answer(text, row) for row in rows]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """For an architecture: a model saved, and loaded in bfloat16 and saved again."""

    @functools.cache
    def make(text: str) -> tuple[Path, Path]:
        saved, again = tmp_path_factory.mktemp(text), tmp_path_factory.mktemp(f"{text}-bfloat16")
        lavin(text).save_pretrained(saved)
        AutoModel.from_pretrained(saved, dtype=torch.bfloat16).save_pretrained(again)
        return saved, again

    return make


@examples(max_examples=12)
@given(text=TEXT, rows=BATCHES)
def test_save_and_reload(folders, text, rows):
    loaded = AutoModel.from_pretrained(folders(text)[0])
    inputs = inputs_of(rows, loaded.config)
    assert all(map(torch.equal, logits(loaded, inputs), logits(lavin(text), inputs)))
    assert generate(loaded, inputs) == [answer(text, row) for row in rows]


@pytest.mark.parametrize("text", ["llama2", "qwen3", "gpt2"])
def test_dtype_round_trip(folders, text):
    """
    Exact: all weights through float32. Through bfloat16 what is trained, and the projector and modality embedding
    that lie under it: they stay in float32. The rest of the base is rounded, once.
    """
    original, kept = dict(lavin(text).named_parameters()), 0
    same, rounded = (
        dict(AutoModel.from_pretrained(folder, dtype=torch.float32).named_parameters()) for folder in folders(text)
    )
    assert set(same) == set(rounded) == set(original)
    for name, weight in original.items():
        assert same[name].dtype == rounded[name].dtype == torch.float32
        assert torch.equal(same[name], weight), name
        stays = ".mma." in name or "multi_modal_projector" in name or "modality_embedding" in name
        assert torch.equal(rounded[name], weight if stays else weight.bfloat16().float()), name
        kept += stays
    assert 20 < kept < len(original) - 20


# Processes

RANK = """
import json, sys
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
sys.path.insert(0, sys.argv[1])
from test_invariance import generate, inputs_of, lavin, logits

torch.set_num_threads(1)
state, model = PartialState(cpu=True), lavin()
assert state.num_processes == 2 and torch.distributed.get_backend() == "gloo"
with state.split_between_processes(json.loads(sys.argv[2])) as rows:
    inputs = inputs_of(rows, model.config)
    mine = [(x.tolist(), y) for x, y in zip(logits(model, inputs), generate(model, inputs))]
everything = gather_object(mine)
if state.is_main_process:
    print(json.dumps(everything))
"""


@pytest.mark.slow
def test_two_processes_share_the_rows(tmp_path):
    draw = random.Random(0)
    rows = [tuple(draw.choice((*range(-7, 0), *range(3, 45))) for _ in range(draw.randint(1, 9))) for _ in range(13)]
    assert 2 < sum(min(row) < 0 for row in rows) < 11
    (tmp_path / "rank.py").write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, tmp_path / "rank.py", Path(__file__).parent, json.dumps(rows)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    got = json.loads(done.stdout.splitlines()[-1])
    assert_as_alone([torch.tensor(x) for x, _ in got], "llama2", rows)
    assert [y for _, y in got] == [answer("llama2", row) for row in rows]
