"""
`python -m lavin.recipes.serve.bench`: tokens per second of the batcher, requests one after another and all at once, in
turns. A random model of the benchmarks' default size, half the requests with an image; no HTTP.
"""

import argparse
import statistics

import torch

from ..bench.models import DEFAULT, adapted_lavin, make_batch
from ..bench.timing import interleave
from ..machine import machine, one_thread_count
from .answer import AnswerText
from .batch import Row
from .batcher import Batcher


class NoText:
    def decode(self, tokens, skip_special_tokens):
        return ""


def make_rows(size, model, requests: int, new_tokens: int) -> list[Row]:
    """Fresh rows, the same each time: prompts of the benchmarks' lengths, answers of one."""
    size = type(size)(**{**vars(size), "batch_size": requests, "answer_tokens": 2})
    batch = make_batch(size, model.config, seed=0)
    rows = []
    for i in range(requests):
        ids = batch["input_ids"][i][batch["attention_mask"][i].bool()]
        image = batch["pixel_values"][i // 2 : i // 2 + 1] if i % 2 == 0 else None
        rows.append(Row(ids, image, new_tokens, AnswerText(NoText()), lambda event: None))
    return rows


def compare(model, size, requests: int, new_tokens: int, rounds: int) -> dict[str, list[float]]:
    """
    Seconds of `requests` answers in each round, `"one by one"` and `"at once"`.

    Raises:
        `RuntimeError`: if a request gets other tokens beside others than alone.
    """
    batchers = {"one by one": Batcher(model, set(), 1), "at once": Batcher(model, set(), requests, 10**9)}
    answers = {}

    def run(name: str):
        rows = make_rows(size, model, requests, new_tokens)
        for row in rows:
            batchers[name].submit(row)
        while not all(row.ended for row in rows):
            batchers[name].step()
        answers[name] = [row.tokens for row in rows]

    seconds = interleave({name: lambda number, name=name: run(name) for name in batchers}, rounds)
    if answers["one by one"] != answers["at once"]:
        raise RuntimeError("Requests got other tokens beside others than alone.")
    return seconds


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(prog="python -m lavin.recipes.serve.bench", description=__doc__)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    with one_thread_count(options.threads):
        model = adapted_lavin(DEFAULT).eval().get_base_model()
        seconds = compare(model, DEFAULT, options.requests, options.new_tokens, options.rounds)
        system = machine()
    tokens = options.requests * options.new_tokens
    print(f"{system['cpu']}, {system['threads']} thread(s), {system['clock']}, torch {system['torch']}")
    print(f"{options.requests} requests of {options.new_tokens} tokens, median of {options.rounds} rounds in turns")
    for name, values in seconds.items():
        print(f"  {name:<10}  {tokens / statistics.median(values):8.1f} tokens/s")
    ratio = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
    print(f"  at once / one by one  {ratio:.1f}x")


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
