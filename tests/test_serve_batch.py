"""The batcher of `lavin serve` alone: whatever joins, leaves or fails beside a row, its tokens are `generate`'s."""

import json
import queue
import random
from collections import Counter

import pytest
import torch
from conftest import TEXTS, VOCAB, pixels, row, tiny_config, tiny_lavin
from transformers import GenerationConfig, Lfm2Config

from lavin import LavinForConditionalGeneration
from lavin.recipes.bench.models import QUICK, adapted_lavin
from lavin.recipes.serve import batch as batch_module
from lavin.recipes.serve import batcher as batcher_module
from lavin.recipes.serve.answer import AnswerText
from lavin.recipes.serve.batch import Ended, Failed, Row, check_cache
from lavin.recipes.serve.batcher import Batcher
from lavin.recipes.serve.bench import compare
from lavin.recipes.serve.prompts import sampling
from lavin.recipes.serve.schema import parse_request


WINDOW = {"sliding_window": 8, "max_position_embeddings": 256}
KINDS = {name: (name, {}) for name in TEXTS} | {
    "mistral, sliding": ("mistral", WINDOW),
    "qwen2, some layers sliding": ("qwen2", {**WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
}


class Numbers:
    """Stands for a tokenizer: a token's text is its number."""

    def decode(self, tokens, skip_special_tokens):
        return "".join(f"{token} " for token in tokens)


def ask(config, images: int, length: int, number: int, new: int = 12, stop=None, **arguments) -> tuple[Row, list]:
    events = []
    values = pixels(images, number) if images else None
    text = AnswerText(Numbers(), stop)
    return Row(row(config, images, length, number), values, new, text, events.append, **arguments), events


def offline(model, asked: Row) -> list[int]:
    images = {} if asked.pixel_values is None else {"pixel_values": asked.pixel_values}
    output = model.generate(
        input_ids=asked.input_ids[None],
        **images,
        max_new_tokens=asked.max_new_tokens,
        do_sample=False,
        eos_token_id=None,
    )
    return output[0, len(asked.input_ids) :].tolist()


def text_of(events: list) -> str:
    return "".join(event for event in events if isinstance(event, str))


def run(batcher: Batcher, rows: list[Row] = ()):
    for asked in rows:
        batcher.submit(asked)
    while batcher.waiting or batcher.batch:
        batcher.step()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_join_at_any_step_equal_generate(kind):
    text, config = KINDS[kind]
    model = tiny_lavin(text, text_config=config)
    check_cache(model)
    rng = random.Random(0)
    rows, events = [], []
    for i in range(24):
        arguments = rng.choice((0, 0, 1, 2)), rng.choice((1, 4, 9, 30, 60)), i, rng.choice((1, 2, 5, 17, 40))
        asked, heard = ask(model.config, *arguments)
        rows.append(asked)
        events.append(heard)
    whole = [offline(model, asked) for asked in rows]
    eos = Counter(token for answer in whole for token in answer[2:10]).most_common(4)[-1][0]
    expected = [answer[: answer.index(eos) + 1] if eos in answer else answer for answer in whole]
    assert {answer[-1] == eos for answer in expected} == {True, False}  # some end by themselves, some are cut
    batcher = Batcher(model, {eos}, max_batch_size=6)
    left, widths, sizes = list(rows), set(), set()
    while left or batcher.waiting or batcher.batch:
        for _ in range(rng.choice((0, 0, 0, 1, 3, 8))):
            if left:
                batcher.submit(left.pop(0))
        batcher.step()
        if batcher.batch is not None:
            sizes.add(len(batcher.batch.rows))
            widths.add(batcher.batch.mask.shape[1])
            assert batcher.batch.mask.shape[1] == max(asked.cached for asked in batcher.batch.rows)  # no idle column
    assert [asked.tokens for asked in rows] == expected
    assert max(sizes) >= 4 and len(widths) > 10
    for asked, heard, answer in zip(rows, events, expected, strict=True):
        assert heard[-1] == Ended("stop" if answer[-1] == eos else "length") and asked.ended
        assert text_of(heard) == " ".join(str(token) for token in answer if token != eos)


def test_other_caches_are_refused():
    """Lfm2 has convolutions: their state belongs to no column."""
    text = Lfm2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, layer_types=["conv", "full_attention"], pad_token_id=0,
    )  # fmt: skip
    config = tiny_config()
    config.text_config = text
    with pytest.raises(ValueError, match="cannot batch a lfm2"):
        check_cache(LavinForConditionalGeneration(config).eval())


@pytest.fixture(scope="module")
def model():
    return tiny_lavin()


def test_prompts_of_very_different_length_are_not_padded_to_each_other(model):
    batcher = Batcher(model, set())
    lengths = [60, 3, 50, 4, 31, 2]
    for i, length in enumerate(lengths):
        batcher.submit(ask(model.config, 0, length, i)[0])
    groups = [[len(asked.input_ids) - 1 for asked in group] for group in batcher._admitted()]
    assert groups == [[60, 50, 31], [4, 3, 2]]


def test_tokens_in_the_cache_are_bounded(model):
    """Rows times their longest length; a row that is longer by itself runs alone; nobody is overtaken for ever."""
    rows = [ask(model.config, 0, length, i, new=10)[0] for i, length in enumerate((9, 9, 9, 9, 70, 9, 9))]
    batcher = Batcher(model, set(), max_batch_size=32, max_batch_tokens=60)
    for asked in rows:
        batcher.submit(asked)
    seen = set()
    while batcher.waiting or batcher.batch:
        batcher.step()
        if batcher.batch is not None:
            seen.add(tuple(rows.index(asked) for asked in batcher.batch.rows))
    assert seen == {(0, 1, 2), (3,), (4,), (5, 6)}


def test_sampling_depends_on_the_request_alone(model):
    def sampled(seed, companions):
        asked = ask(model.config, 1, 5, 3, temperature=1.0, top_p=0.9, top_k=40, seed=seed)[0]
        run(Batcher(model, set()), [ask(model.config, 0, 20, 9)[0]] * companions + [asked])
        return asked.tokens

    assert sampled(1, 0) == sampled(1, 1) != sampled(2, 1)
    assert sampled(None, 0) != sampled(None, 0)
    greedy = ask(model.config, 1, 5, 3)[0]
    assert sampled(1, 0) != offline(model, greedy)
    nearly = ask(model.config, 1, 5, 3, temperature=1.0, top_p=1e-6, seed=1)[0]
    run(Batcher(model, set()), [nearly])
    assert nearly.tokens == offline(model, greedy)


def test_a_stop_string_ends_a_row(model):
    asked, heard = ask(model.config, 0, 9, 0, new=30)
    answer = offline(model, asked)
    stop = f"{answer[4]} {answer[5]}"
    whole = " ".join(map(str, answer))
    stopped, events = ask(model.config, 0, 9, 0, new=30, stop=[stop, "no such text"])
    run(Batcher(model, set()), [stopped])
    assert text_of(events) == whole[: whole.index(stop)].strip() and events[-1] == Ended("stop")
    assert len(stopped.tokens) < 10


def test_a_cancelled_row_leaves_and_hears_no_more(model):
    stays, leaves, waits = (ask(model.config, n, 9, n, new=30) for n in (0, 1, 2))
    expected = offline(model, stays[0])
    batcher = Batcher(model, set(), max_batch_size=2)
    for asked, _ in (stays, leaves, waits):
        batcher.submit(asked)
    for _ in range(3):
        batcher.step()
    batcher.cancel(waits[0])
    batcher.cancel(leaves[0])
    assert not batcher.waiting
    heard = len(leaves[1])
    batcher.step()
    assert batcher.batch.rows == [stays[0]]
    run(batcher)
    assert stays[0].tokens == expected and len(leaves[1]) == heard and not waits[1]


def failing(monkeypatch, model, when, error):
    """Makes the model raise whenever `when(input_ids)` holds."""
    forward = model.forward

    def broken(*args, **kwargs):
        if when(kwargs["input_ids"]):
            raise error
        return forward(*args, **kwargs)

    monkeypatch.setattr(model, "forward", broken)


def test_one_bad_prompt_fails_alone(model, monkeypatch):
    good = [ask(model.config, n, 9, n) for n in (0, 1)]
    expected = [offline(model, asked) for asked, _ in good]
    bad, events = ask(model.config, 0, 9, 5)
    bad.input_ids[3] = VOCAB - 1
    memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nmore")
    failing(monkeypatch, model, lambda ids: (ids == VOCAB - 1).any(), memory)
    batcher = Batcher(model, set())
    run(batcher, [good[0][0], bad, good[1][0]])
    assert [asked.tokens for asked, _ in good] == expected
    (failed,) = events
    assert failed.status == 500 and failed.message.endswith("Tried to allocate 20 GiB.") and "memory" in failed.message


def test_a_prompt_that_never_fits_leaves_the_limit_as_it_was(model, monkeypatch):
    runs, (huge, events) = ask(model.config, 0, 9, 0, new=20)[0], ask(model.config, 0, 9, 5)
    huge.input_ids[3] = VOCAB - 1
    batcher = Batcher(model, set())
    with monkeypatch.context() as patch:
        failing(patch, model, lambda ids: (ids == VOCAB - 1).any(), torch.OutOfMemoryError("out of memory"))
        batcher.submit(runs)
        batcher.step()
        batcher.submit(huge)
        batcher.step()
        assert not huge.ended and batcher.fitting_tokens < 100, "it is tried once more, alone"
        run(batcher)
    assert events[-1].status == 500 and len(runs.tokens) == 20
    assert batcher.fitting_tokens == batcher.max_batch_tokens


def test_memory_that_ran_out_once_is_tried_again(model, monkeypatch):
    """Another program took it for a while: four rows at once, then fewer, at last four again."""
    monkeypatch.setattr(batcher_module, "CALM_STEPS", 5)
    full = torch.OutOfMemoryError("out of memory")
    rows = [ask(model.config, 0, 9, n, new=20)[0] for n in range(12)]
    expected = [offline(model, asked) for asked in rows]
    batcher = Batcher(model, set(), max_batch_tokens=4 * 30)
    sizes = []
    for asked in rows:
        batcher.submit(asked)
    with monkeypatch.context() as patch:
        failing(patch, model, lambda ids: ids.shape == (4, 1), full)
        batcher.step()
    while batcher.waiting or batcher.batch:
        batcher.step()
        sizes.append(len(batcher.batch.rows) if batcher.batch else 0)
    assert sizes[0] == 2 and 4 in sizes and [asked.tokens for asked in rows] == expected


def test_a_failing_step_ends_its_rows_and_the_next_request_is_answered(model, monkeypatch):
    asked, events = ask(model.config, 1, 9, 0)
    batcher = Batcher(model, set())
    with monkeypatch.context() as patch:
        failing(patch, model, lambda ids: ids.shape[1] == 1, RuntimeError("broken kernel"))
        run(batcher, [asked])
    assert events[-1] == Failed(500, "The model failed on this request's batch: RuntimeError: broken kernel")
    again, events = ask(model.config, 1, 9, 0)
    run(batcher, [again])
    assert again.tokens == offline(model, again) and events[-1] == Ended("length")


def test_rows_that_cannot_join_leave_the_others_as_they_were(model, monkeypatch):
    runs, comes = (ask(model.config, n, 9, n, new=20) for n in (0, 1))
    batcher = Batcher(model, set())
    batcher.submit(runs[0])
    batcher.step()
    calls, stacked = [], batch_module.stacked

    def full(first, second):
        calls.append(None)
        if len(calls) == 4:  # the values of the second layer
            raise torch.OutOfMemoryError("out of memory")
        return stacked(first, second)

    with monkeypatch.context() as patch:
        patch.setattr(batch_module, "stacked", full)
        batcher.submit(comes[0])
        batcher.step()
    assert not comes[0].ended and len(batcher.waiting) == 1, "it waits until there is room"
    run(batcher)
    assert [asked.tokens for asked in (runs[0], comes[0])] == [offline(model, asked) for asked in (runs[0], comes[0])]


def test_the_image_token_is_never_generated(monkeypatch):
    """A padded vocabulary holds it, and here the model likes it best."""
    padded = tiny_lavin("llama2_padded")
    forward, image_token_id = padded.forward, padded.config.image_token_id

    def eager(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits[..., image_token_id] = 1e4
        return output

    monkeypatch.setattr(padded, "forward", eager)
    greedy, sampled = ask(padded.config, 1, 9, 0)[0], ask(padded.config, 1, 9, 0, temperature=1.0)[0]
    run(Batcher(padded, set()), [greedy, sampled])
    assert len(sampled.tokens) == 12 and image_token_id not in [*greedy.tokens, *sampled.tokens]


def test_scores_that_are_not_finite_are_an_error_of_their_row(model, monkeypatch):
    forward, (sick, sick_events), (well, _) = model.forward, ask(model.config, 0, 9, 0), ask(model.config, 1, 9, 1)

    def nan(*args, **kwargs):
        output = forward(*args, **kwargs)
        if kwargs["input_ids"].shape[1] == 1 and len(output.logits) == 2:
            output.logits[batcher.batch.rows.index(sick), -1, 3] = torch.nan
        return output

    expected = offline(model, well)
    monkeypatch.setattr(model, "forward", nan)
    batcher = Batcher(model, set())
    run(batcher, [sick, well])
    assert "not finite" in sick_events[-1].message and well.tokens == expected


def test_the_worker(model):
    """The thread itself: answers, survives a listener that raises, and ends every row when it is closed."""
    heard = queue.Queue()
    asked = ask(model.config, 1, 9, 0)[0]
    asked.emit = heard.put
    deaf = ask(model.config, 0, 9, 1)[0]
    deaf.emit = lambda event: 1 / 0
    batcher = Batcher(model, set())
    assert not batcher.healthy
    batcher.start()
    batcher.submit(deaf)
    batcher.submit(asked)
    events = [heard.get(timeout=60)]
    while isinstance(events[-1], str):
        events.append(heard.get(timeout=60))
    assert events[-1] == Ended("length") and batcher.healthy
    endless, waiting, late = (ask(model.config, 0, 9, n, new=10**9)[0] for n in range(3))
    endless.emit = waiting.emit = late.emit = heard.put
    batcher.submit(endless)
    while isinstance(heard.get(timeout=60), str) and len(endless.tokens) < 3:
        pass
    batcher.submit(waiting)
    batcher.close()
    assert not batcher.thread.is_alive() and not batcher.healthy
    batcher.submit(late)
    ends = []
    while len(ends) < 3:
        event = heard.get(timeout=60)
        ends += [event] * (not isinstance(event, str))
    assert {end.status for end in ends} == {503} and all("shutting down" in end.message for end in ends)


SAMPLED = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20}
CHOICES = [
    ({}, {}, {}),
    ({}, {"seed": 3}, {}),
    ({}, {"top_p": 1}, {}),
    ({}, {"temperature": 0, "top_p": 0.5}, {}),
    ({}, {"temperature": 0.7}, {"temperature": 0.7, "top_p": 1.0, "top_k": 0}),
    ({}, {"top_p": 0.5, "seed": 3}, {"temperature": 1.0, "top_p": 0.5, "top_k": 0, "seed": 3}),
    ({"temperature": 0.6, "top_p": 0.9}, {}, {}),
    (SAMPLED, {}, {"temperature": 0.6, "top_p": 0.9, "top_k": 20}),
    (SAMPLED, {"temperature": 0.1, "top_p": 1}, {"temperature": 0.1, "top_p": 1.0, "top_k": 20}),
    (SAMPLED, {"temperature": 0}, {}),
]


@pytest.mark.parametrize("config, asked, expected", CHOICES)
def test_greedy_unless_request_or_model_say_otherwise(config, asked, expected):
    request = parse_request(
        json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}], **asked}).encode()
    )
    found = sampling(request, GenerationConfig(**config))
    assert found == ({"seed": None, **expected} if expected else {})


def test_the_benchmark_finds_the_same_answers():
    peft = adapted_lavin(QUICK).eval()
    seconds = compare(peft.get_base_model(), QUICK, requests=4, new_tokens=3, rounds=2)
    assert list(seconds) == ["one by one", "at once"] and all(len(values) == 2 for values in seconds.values())
