"""One run of the comparison: `trl sft` on a recipe, then the quickstart's questions and an untrained skill."""

import json
import math
import random
import resource
import sys
import time
from pathlib import Path

import psutil
import torch
import yaml
from peft import set_peft_model_state_dict
from safetensors.torch import load_file

from lavin import LavinForConditionalGeneration, LavinProcessor
from lavin.peft_lavin import ADAPTER

from ..data.scienceqa import format_answer, format_question
from ..evaluate.answers import answer, render
from ..evaluate.scienceqa import parse_letter
from ..evaluate.text import log_likelihoods
from ..machine import end_with_parent
from ..quickstart.evaluate import evaluate, load_questions
from ..quickstart.pretrain_text import sample_row
from ..report import percent
from .runs import RESULT


KEPT = 320  # questions on the skill that is never trained
EVERY = 64  # questions at once


def start_model(recipe: dict):
    """The model as a recipe's training starts: some of it trainable, all of it in float32."""
    settings = recipe.get("model_init_kwargs") or {}
    return LavinForConditionalGeneration.from_pretrained(recipe["model_name_or_path"], dtype=torch.float32, **settings)


def trained_model(recipe: dict):
    """
    What a recipe's training wrote, ready to answer.

    Args:
        recipe (`dict`): Settings of `trl sft`, of a run that has ended.

    Returns:
        `tuple(LavinForConditionalGeneration, int)`: the model, and how many of its values were trained.

    Raises:
        `ValueError`: if an adapter of PEFT's own lacks weights of the model, or has others.
    """
    folder, model = Path(recipe["output_dir"]), start_model(recipe)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    count = sum(weight.numel() for weight in trained.values())
    if "peft" not in (recipe.get("model_init_kwargs") or {}):
        return LavinForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval(), count
    found = set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"), adapter_name=ADAPTER)
    problems = sorted({*found.unexpected_keys, *(set(found.missing_keys) & set(trained))})
    if problems:
        raise ValueError(f"{folder} is not what {recipe['model_init_kwargs']} trains: {', '.join(problems[:5])}.")
    return model.get_base_model().eval(), count  # the adapter is in place there


def untrained_skill(number: int = KEPT) -> list[dict]:
    """Questions that both tiny language models learned and no training row asks: which option says a word."""
    rng = random.Random("compare: text ability")
    return [sample_row(rng, lesson=1.0)[0] for _ in range(number)]


def text_ability(model, processor, problems: list[dict]) -> dict[str, float]:
    """
    How well a model still does on text what its language model could do before.

    Args:
        model ([`LavinForConditionalGeneration`]): The model, in eval mode.
        processor ([`LavinProcessor`]): Its processor.
        problems (`list[dict]`): ScienceQA records without images.

    Returns:
        `dict[str, float]`: `skill`, percent of letters that are right; `perplexity` of the right answers' tokens.
    """
    prompts = [format_question(problem) for problem in problems]
    letters = [parse_letter(text) for text in answer(model, processor, prompts, batch_size=EVERY, max_new_tokens=6)]
    right = [letter == problem["answer"] for letter, problem in zip(letters, problems, strict=True)]
    tokenizer, rows = processor.tokenizer, []
    for prompt, problem in zip(prompts, problems, strict=True):
        given, wanted = tokenizer(
            [render(processor, prompt, 0), format_answer(problem)], add_special_tokens=False
        ).input_ids
        rows.append((given + wanted + [tokenizer.eos_token_id], len(given)))
    scores = log_likelihoods(model, rows, EVERY, "text ability")
    mean = sum(float(score.double().sum()) for score in scores) / sum(map(len, scores))
    return {"skill": percent(right), "perplexity": round(math.exp(-mean), 4)}


def train(file: Path) -> dict[str, float]:
    """
    Runs TRL's own script for `trl sft` in this process: its largest memory is then the training's.

    Args:
        file (`Path`): The recipe.

    Returns:
        `dict[str, float]`: `seconds` on the clock, `cpu_seconds`, and `peak_mb`: the largest resident memory above
            that before it, when all code was loaded, in 10^6 bytes.
    """
    from trl import SFTTrainer  # noqa: F401
    from trl.scripts.sft import main, make_parser

    settings = make_parser(prog="trl sft").parse_args_and_config(["--config", str(file)], fail_with_unknown_args=True)
    start, cpu_start, before = time.time(), time.process_time(), psutil.Process().memory_info().rss
    main(*settings)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "seconds": round(time.time() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu_start, 1),
        "peak_mb": round((peak - before) / 1e6),
    }


def run_one(folder: Path, data: Path, split: str) -> dict:
    """
    Trains and scores one run. A recipe with no steps (`max_steps: 0`) is only scored: the model before training.

    Args:
        folder (`Path`): Holds the recipes of its segments, in the order of their names, mostly one; `result.json` is
            written there.
        data (`Path`): A folder in ScienceQA's format.
        split (`str`): The questions to answer.

    Returns:
        `dict`: what `result.json` then holds.
    """
    torch.set_num_threads(1)
    files = sorted(folder.glob("*.yaml"))
    recipes = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in files]
    result = {"recipes": recipes, "split": split, "trained": 0, "seconds": 0, "cpu_seconds": 0, "peak_mb": 0}
    for file, recipe in zip(files, recipes, strict=True):
        if recipe["max_steps"]:
            used = train(file)
            result.update({name: round(result[name] + used[name], 1) for name in ("seconds", "cpu_seconds")})
            result["peak_mb"] = max(result["peak_mb"], used["peak_mb"])
    recipe = recipes[-1]
    if recipe["max_steps"]:
        model, result["trained"] = trained_model(recipe)
    else:
        model = start_model(recipe).eval()
    processor = LavinProcessor.from_pretrained(recipe["model_name_or_path"])
    start = time.time()
    result["scores"] = evaluate(model, processor, load_questions(data, split), EVERY)
    result["text"] = text_ability(model, processor, untrained_skill())
    result["evaluation_seconds"] = round(time.time() - start, 1)
    unfinished = folder / f"{RESULT}.part"
    unfinished.write_text(json.dumps(result, indent=1), encoding="utf-8")
    unfinished.rename(folder / RESULT)
    return result


if __name__ == "__main__":
    end_with_parent()
    run_one(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
