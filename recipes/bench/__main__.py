"""
Runs the benchmarks one after another.

    python -m lavin.recipes.bench                 # all of them, default sizes, about half an hour on one core
    python -m lavin.recipes.bench --only step     # one of them
    python -m lavin.recipes.bench --quick         # seconds: checks that they run, the numbers mean nothing

Each prints a table and writes `<output>/<name>.json`. At the end comes a table of everything that has a goal, also
written as `<output>/goals.md`: of all benchmarks whose JSON lies there, so that they can be run one by one.
"""

import argparse
import json
from pathlib import Path

from ..machine import one_thread_count
from ..report import markdown_table
from . import decode_time, growth, memory_peak, prefill_time, start_time, step_time, train_rate
from .models import DEFAULT, QUICK, Size
from .timing import goal_rows, report


BENCHMARKS = {
    "step": step_time,
    "train": train_rate,
    "memory": memory_peak,
    "decode": decode_time,
    "prefill": prefill_time,
    "start": start_time,
    "growth": growth,
}


def main(arguments: list[str] | None = None):
    """Command line of the package."""
    parser = argparse.ArgumentParser(prog="python -m lavin.recipes.bench", description="LaVIN's benchmarks.")
    parser.add_argument("--only", choices=list(BENCHMARKS), help="run one of them")
    parser.add_argument("--quick", action="store_true", help="tiny models and few rounds: does it run?")
    defaults = ", ".join(f"{name} {benchmark.ROUNDS}" for name, benchmark in BENCHMARKS.items())
    parser.add_argument("--rounds", type=int, help=f"rounds of each benchmark (default: {defaults}; 2 with --quick)")
    parser.add_argument("--batch-size", type=int, help="rows of a training step (default: 4)")
    parser.add_argument("--patch-size", type=int, help="of the vision tower (default: 32)")
    parser.add_argument("--lora-dropout", type=float, default=0.0, help="PEFT's default is 0, TRL's 0.05")
    parser.add_argument("--threads", type=int, default=1, help="of torch; one is steadier on shared cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"), help="folder of the JSON files")
    options = parser.parse_args(arguments)

    size = QUICK if options.quick else DEFAULT
    changes = {"batch_size": options.batch_size, "patch_size": options.patch_size}
    size = Size(**{**vars(size), **{name: value for name, value in changes.items() if value is not None}})
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds must be at least 1, got {options.rounds}")
    with one_thread_count(options.threads):
        for name, benchmark in BENCHMARKS.items():
            if options.only in (None, name):
                rounds = options.rounds or (2 if options.quick else benchmark.ROUNDS)
                result = benchmark.run(size, rounds=rounds, seed=options.seed, lora_dropout=options.lora_dropout)
                report(result, options.output / f"{benchmark.NAME}.json")
                if benchmark is growth:
                    print(f"  -> {growth.plot(result, options.output / 'growth.png')}")

    files = [options.output / f"{benchmark.NAME}.json" for benchmark in BENCHMARKS.values()]
    rows = goal_rows([json.loads(file.read_text(encoding="utf-8")) for file in files if file.is_file()])
    if rows:
        table = markdown_table(rows)
        (options.output / "goals.md").write_text(table + "\n", encoding="utf-8")
        print(f"\n{table}\n  -> {options.output / 'goals.md'}")


if __name__ == "__main__":
    main()
