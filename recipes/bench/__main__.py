"""
Runs the benchmarks one after another.

    python -m lavin.recipes.bench                 # all of them, default sizes, some minutes on one core
    python -m lavin.recipes.bench --only step     # one of them: `step` or `decode`
    python -m lavin.recipes.bench --quick         # seconds: checks that they run, the numbers mean nothing

Each prints a table and writes `<output>/<name>.json`.
"""

import argparse
from pathlib import Path

from . import decode_time, step_time
from .models import DEFAULT, QUICK, Size
from .timing import one_thread_count, report


BENCHMARKS = {"step": step_time, "decode": decode_time}


def main(arguments: list[str] | None = None):
    """Command line of the package."""
    parser = argparse.ArgumentParser(prog="python -m lavin.recipes.bench", description="LaVIN's benchmarks.")
    parser.add_argument("--only", choices=sorted(BENCHMARKS), help="run one of them")
    parser.add_argument("--quick", action="store_true", help="tiny models and few rounds: does it run?")
    parser.add_argument("--rounds", type=int, help="rounds of each benchmark (default: 15; 2 with --quick)")
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
    rounds = options.rounds if options.rounds is not None else (2 if options.quick else 15)
    if rounds < 1:
        parser.error(f"--rounds must be at least 1, got {rounds}")
    with one_thread_count(options.threads):
        for name, benchmark in BENCHMARKS.items():
            if options.only in (None, name):
                result = benchmark.run(size, rounds=rounds, seed=options.seed, lora_dropout=options.lora_dropout)
                report(result, options.output / f"{benchmark.NAME}.json")


if __name__ == "__main__":
    main()
