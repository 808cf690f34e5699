"""
What TRL's cast of trained weights to bfloat16 costs on a 4-bit base.

    python -m lavin.recipes.bench.cast            # some minutes on one core
    python -m lavin.recipes.bench.cast --quick    # seconds: checks that it runs, the numbers mean nothing

TRL casts what is trained to bfloat16 when the base is loaded in 4 or 8 bits; [`LavinPeftModel`] does not let it. The
quickstart's tiny pair is trained both ways by TRL's own trainer with the settings of `scienceqa/lavin-7b-lite.yaml`.
Prints a table and writes `<output>/cast.json`.
"""

import argparse
import json
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from transformers import TrainerCallback, set_seed

from ..machine import machine, one_thread_count


NAME = "cast"
RECIPE = Path(__file__).resolve().parents[1] / "scienceqa" / "lavin-7b-lite.yaml"
# What a CPU and a short run ask for: one step takes the recipe's 32 rows at once, which changes nothing but the time.
OVERRIDES = [
    "--use_cpu", "true", "--per_device_train_batch_size", "32", "--gradient_accumulation_steps", "1",
    "--gradient_checkpointing", "false", "--dataloader_num_workers", "0", "--save_strategy", "no",
    "--report_to", "none",
]  # fmt: skip
PARTS = {
    "adapter_down": "down maps",
    "adapter_up": "up maps",
    "adapter_router": "routers",
    "multi_modal_projector": "projector",
    "modality_embedding": "modality embedding",
}
ROWS = {"train": (3000, 1600, 700, 700), "val": (1, 1, 1, 1), "test": (160, 160, 80, 80)}
QUICK_ROWS = dict.fromkeys(ROWS, (6, 6, 2, 2))
LAST = 50  # steps that the final loss is the mean of


class Movement(TrainerCallback):
    """Notes which entries of the trained weights have had any other value than at first, and the losses."""

    def __init__(self, model):
        trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.weights = trained
        self.first = {name: weight.detach().clone() for name, weight in trained.items()}
        self.moved = {name: torch.zeros_like(weight, dtype=torch.bool) for name, weight in trained.items()}
        self.losses = []

    def on_step_end(self, args, state, control, **kwargs):
        for name, weight in self.weights.items():
            self.moved[name] |= weight.detach() != self.first[name]

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            self.losses.append(logs["loss"])

    def never_moved(self) -> dict[str, float]:
        """Percent of the entries that never moved, of each part and of all."""
        still, entries = defaultdict(int), defaultdict(int)
        for name, moved in self.moved.items():
            part = next(label for key, label in PARTS.items() if key in name)
            for label in (part, "all"):
                still[label] += int((~moved).sum())
                entries[label] += moved.numel()
        return {label: 100 * still[label] / entries[label] for label in [*PARTS.values(), "all"]}


def train(folder: Path, rows: str, output: Path, cast: bool, steps: int, seed: int):
    """
    One run of TRL's trainer on a 4-bit base.

    Args:
        folder (`Path`): A light LaVIN folder.
        rows (`str`): Parquet files of `lavin data`.
        output (`Path`): The trainer's folder.
        cast (`bool`): Whether TRL may cast the trained weights to bfloat16.
        steps (`int`): Optimiser steps.
        seed (`int`): Of the order of the rows and of dropout.

    Returns:
        `tuple`: the trained model, its processor and its [`Movement`].
    """
    from datasets import load_dataset
    from trl import SFTTrainer, get_quantization_config
    from trl.scripts.sft import make_parser

    from lavin import LavinForConditionalGeneration, LavinProcessor

    own = ["--config", str(RECIPE), "--output_dir", str(output), "--max_steps", str(steps), "--seed", str(seed)]
    _, args, model_args, _ = make_parser().parse_args_and_config([*own, *OVERRIDES, "--logging_steps", "1"])
    set_seed(args.seed)
    model = LavinForConditionalGeneration.from_pretrained(
        folder,
        dtype=model_args.dtype,
        quantization_config=get_quantization_config(model_args),
        **args.model_init_kwargs,
    )
    args.model_init_kwargs = None  # used just now
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes' layout for it needs widths that 64 divides
            module.support_avx512bf16_for_cpu = False
    if cast:
        model.is_loaded_in_4bit = True  # what TRL looks at, and what a LavinPeftModel hides
    dataset = load_dataset("parquet", data_files=rows, split="train")
    processor = LavinProcessor.from_pretrained(folder)
    trainer = SFTTrainer(model=model, args=args, train_dataset=dataset, processing_class=processor)
    movement = Movement(trainer.model)
    trainer.add_callback(movement)
    trainer.train()
    return trainer.model, processor, movement


def run(steps: int, seed: int = 0, sizes: dict | None = None) -> dict:
    """
    Measures it.

    Args:
        steps (`int`): Optimiser steps of each run.
        seed (`int`, *optional*, defaults to 0): Of the order of the rows and of dropout, the same for both.
        sizes (`dict`, *optional*, defaults to `ROWS`): Rows of each split and kind, as `write_dataset` takes them.

    Returns:
        `dict`: `results` for `"float32"` and `"bfloat16"`, and what they were measured with.
    """
    from ..data.prepare import prepare
    from ..data.scienceqa import ScienceQA
    from ..quickstart.data import write_dataset
    from ..quickstart.evaluate import evaluate, load_questions
    from ..quickstart.quickstart import make_model

    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        write_dataset(scratch / "data", sizes or ROWS)
        rows = prepare(ScienceQA(scratch / "data", "train", "QCM-ALE", False), scratch / "rows", "train").pattern
        make_model(scratch / "light")
        questions = load_questions(scratch / "data")
        for cast in (False, True):
            model, processor, movement = train(scratch / "light", rows, scratch / "run", cast, steps, seed)
            losses = movement.losses
            dtypes = {str(weight.dtype).removeprefix("torch.") for weight in movement.weights.values()}
            scores = evaluate(model.get_base_model(), processor, questions)
            results[" ".join(dtypes)] = {
                "loss_first": losses[0],
                "loss_last": sum(losses[-LAST:]) / len(losses[-LAST:]),
                "accuracy": {key: scores[key] for key in ("IMG", "AVG")},
                "never_moved": movement.never_moved(),
            }
    return {
        "title": "Trained weights of a 4-bit base: kept in float32, or cast to bfloat16 as TRL does",
        "name": NAME,
        "machine": machine(),
        "steps": steps,
        "seed": seed,
        "recipe": f"{RECIPE.parent.name}/{RECIPE.name}",
        "questions": len(questions),
        "results": results,
    }


def report(result: dict, path: Path):
    """Prints the table and writes it as JSON."""
    print(f"\n{result['title']}")
    print(f"The quickstart's pair, settings of {result['recipe']}, {result['steps']} steps of 32 rows")
    kinds = list(result["results"])
    rows = [("loss of the first step", "loss_first", None), (f"mean loss of the last {LAST} steps", "loss_last", None)]
    rows += [(f"right, {key}, %", "accuracy", key) for key in ("IMG", "AVG")]
    rows += [(f"never moved, {label}, %", "never_moved", label) for label in [*PARTS.values(), "all"]]
    width = max(len(label) for label, *_ in rows)
    print(f"  {'':<{width}}" + "".join(f"{kind:>12}" for kind in kinds))
    for label, name, key in rows:
        values = [result["results"][kind][name] for kind in kinds]
        values = [value if key is None else value[key] for value in values]
        digits = 4 if name.startswith("loss") else 1
        print(f"  {label:<{width}}" + "".join(f"{value:>12.{digits}f}" for value in values))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"  -> {path}")


def main(arguments: list[str] | None = None):
    """Command line of the measurement."""
    parser = argparse.ArgumentParser(
        prog="python -m lavin.recipes.bench.cast", description=__doc__.strip().split("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="few rows and steps: does it run?")
    parser.add_argument("--steps", type=int, help="optimiser steps of each run (default: 200; 2 with --quick)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="of torch; one is steadier on shared cores")
    parser.add_argument("--output", type=Path, default=Path("outputs/bench"), help="folder of the JSON file")
    options = parser.parse_args(arguments)
    steps = options.steps if options.steps is not None else (2 if options.quick else 200)
    if steps < 1:
        parser.error(f"--steps must be at least 1, got {steps}")
    with one_thread_count(options.threads):
        result = run(steps, options.seed, QUICK_ROWS if options.quick else ROWS)
    report(result, options.output / f"{NAME}.json")


if __name__ == "__main__":
    main()
