"""The parser of `lavin eval`; what its commands import is imported when they run."""

import argparse
import json
import sys


def add_eval_parser(commands):
    """Adds `lavin eval` to the subcommands of `lavin`."""
    parser = commands.add_parser("eval", help="ask a benchmark's questions and score the answers")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")

    scienceqa = kinds.add_parser("scienceqa", help="ScienceQA: the official table")
    _common(scienceqa, "scienceqa", predictions="choice index or answer text")
    scienceqa.add_argument(
        "--root", required=True, metavar="DIR", help="holds problems.json, pid_splits.json, images/"
    )
    scienceqa.add_argument("--split", default="test", help="default: test")
    scienceqa.add_argument(
        "--format", dest="prompt_format", metavar="FORMAT", help="as the model was trained; default: QCM-ALE"
    )
    scienceqa.add_argument("--captions", action="store_true", help="add the images' captions to the context")
    _mode(scienceqa)
    scienceqa.set_defaults(run=run_scienceqa, fail=scienceqa.error)

    mme = kinds.add_parser("mme", help="MME: acc and acc+ of each subtask, perception and cognition")
    _common(mme, "mme", predictions="answer text")
    mme.add_argument("--root", required=True, metavar="DIR", help="holds a folder for each subtask")
    mme.set_defaults(run=run_mme, fail=mme.error)

    own = kinds.add_parser("own", help="a task of your own, named by a YAML")
    _common(own, "NAME, as the YAML says")
    own.add_argument("--config", required=True, metavar="FILE.yaml", help="names Parquet, prompt template and metric")
    _mode(own)
    own.set_defaults(run=run_own)

    text = kinds.add_parser("text", help="plain text: the base alone, with the adapter, with the adapter off")
    _common(text, "text")
    text.add_argument(
        "--data", required=True, nargs="+", metavar="FILE",
        help="text (perplexity), or JSONL with `text`, or with `question`, `choices` and `answer`",
    )  # fmt: skip
    text.add_argument("--max-length", type=int, default=1024, metavar="N", help="tokens of a piece; default: 1024")
    text.set_defaults(run=run_text)


def _common(parser: argparse.ArgumentParser, folder: str, predictions: str | None = None):
    asked = parser.add_mutually_exclusive_group(required=True) if predictions else parser
    asked.add_argument("--model", required=not predictions, metavar="DIR", help="a LaVIN folder or Hub name")
    parser.add_argument("--output", metavar="DIR", help=f"answers and results; default: outputs/eval/{folder}")
    parser.add_argument("--batch-size", type=int, metavar="N", help="questions at once; changes the speed only")
    parser.add_argument("--device", help="default: the GPU where there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on GPU")
    parser.add_argument(
        "--json", dest="as_json", action="store_true", help="print the scores as one JSON object and nothing else"
    )
    if predictions:
        asked.add_argument(
            "--predictions", metavar="FILE", help=f"only score these: JSON from question id to {predictions}"
        )
        parser.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer")


def _mode(parser: argparse.ArgumentParser):
    parser.add_argument(
        "--mode", choices=("generate", "letters"),
        help='generate an answer, or take the most likely letter after "The answer is"; default: generate',
    )  # fmt: skip


def run_scienceqa(
    model, predictions, root, split, output, prompt_format, captions, mode, max_new_tokens, batch_size, device, dtype,
    as_json, fail, **_,
):  # fmt: skip
    options = {"mode": mode, "batch_size": batch_size, "device": device, "dtype": dtype}
    if predictions:
        _not_asked(fail, format=prompt_format, captions=captions, max_new_tokens=max_new_tokens, **options)
    from . import scienceqa as task

    if predictions:
        results = task.score_predictions(root, split, predictions)
        return _scored(task.show(results), results, output, as_json)
    output = output or "outputs/eval/scienceqa"
    given = {name: value for name, value in {"prompt_format": prompt_format, **options}.items() if value is not None}
    results, table = task.evaluate_scienceqa(
        model, root, split, output, captions=captions, max_new_tokens=max_new_tokens, **given
    )
    _show(table, results, output, as_json)


def run_mme(model, predictions, root, output, max_new_tokens, batch_size, device, dtype, as_json, fail, **_):
    options = {"batch_size": batch_size, "device": device, "dtype": dtype, "max_new_tokens": max_new_tokens}
    if predictions:
        _not_asked(fail, **options)
    from . import mme as task

    if predictions:
        results = task.score_predictions(root, predictions)
        return _scored(task.show(results), results, output, as_json)
    output = output or "outputs/eval/mme"
    given = {name: value for name, value in options.items() if value is not None}
    results, table = task.evaluate_mme(model, root, output, **given)
    _show(table, results, output, as_json)


def _not_asked(fail, **options):
    """Ends with a message where options of asking are given though answers are only scored."""
    if given := [f"--{name.replace('_', '-')}" for name, value in options.items() if value not in (None, False)]:
        fail(f"--predictions only scores answers that are there: {', '.join(given)} would do nothing")


def run_own(model, config, output, mode, batch_size, device, dtype, as_json, **_):
    from . import own as task

    output = output or f"outputs/eval/{task.read_config(config)['name']}"
    options = {"mode": mode or "generate", "batch_size": batch_size, "device": device, "dtype": dtype}
    results, table = task.evaluate_own(model, config, output, **options)
    _show(table, results, output, as_json)


def run_text(model, data, output, max_length, batch_size, device, dtype, as_json, **_):
    from . import text as task

    output = output or "outputs/eval/text"
    results, table = task.evaluate_text(model, data, output, batch_size, max_length, device, dtype)
    _show(table, results, output, as_json)


def _scored(table: str, results: dict, output, as_json: bool):
    """Shows what was only scored, and writes it where a folder is named."""
    from .run import write_results

    if output:
        write_results(output, results, table)
    if as_json:
        print(table.splitlines()[-1], file=sys.stderr)
        print(json.dumps(results["scores"]))
    else:
        print(table)


def _show(table: str, results: dict, output, as_json: bool):
    from .run import summary

    print(
        summary(results, output) if as_json else f"\n{table}\n{summary(results, output)}",
        file=sys.stderr if as_json else sys.stdout,
    )
    if as_json:
        print(json.dumps(results["scores"]))
