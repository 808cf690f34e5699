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

    caption = kinds.add_parser("caption", help="captions: CIDEr, BLEU-4, ROUGE-L (METEOR where there is Java)")
    _common(caption, "caption")
    caption.add_argument(
        "--annotations", required=True, metavar="FILE", help="captions_val2014.json or Karpathy's dataset_coco.json"
    )
    caption.add_argument("--split", default="test", metavar="NAME", help="of Karpathy's file; default: test")
    caption.add_argument("--prompt", metavar="TEXT", help="as the model was trained")
    _image_options(caption, 30)
    _beams(caption)
    caption.add_argument("--min-new-tokens", type=int, metavar="N", help="shortest caption; default: 8")
    caption.set_defaults(run=run_caption)

    vqa = kinds.add_parser("vqa", help="VQAv2, OK-VQA, TextVQA (official score), GQA, OCR-VQA (exact match)")
    _common(vqa, "vqa")
    vqa.add_argument("--questions", required=True, metavar="FILE", help="the questions as they are published")
    vqa.add_argument("--annotations", metavar="FILE", help="the answers, of VQAv2 and OK-VQA")
    vqa.add_argument("--split", default="test", metavar="NAME", help="of OCR-VQA: train, val, test (default)")
    _image_options(vqa, "10, of OCR-VQA 100")
    _beams(vqa)
    vqa.set_defaults(run=run_vqa)

    grounding = kinds.add_parser("grounding", help="RefCOCO, RefCOCO+, RefCOCOg: boxes at IoU >= 0.5")
    _common(grounding, "grounding")
    grounding.add_argument(
        "--input", required=True, action="append", dest="inputs", metavar="FILE",
        help="MDETR's .json or Qwen-VL's .jsonl; may be given several times",
    )  # fmt: skip
    _image_options(grounding, 64)
    grounding.set_defaults(run=run_grounding)

    pope = kinds.add_parser("pope", help="POPE: accuracy, precision, recall, F1, share of yes")
    _common(pope, "pope")
    pope.add_argument(
        "--input", required=True, action="append", dest="inputs", metavar="FILE",
        help="coco_pope_random.json, ...; may be given several times",
    )  # fmt: skip
    _image_options(pope, 64)
    pope.set_defaults(run=run_pope)


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


def _image_options(parser: argparse.ArgumentParser, longest):
    parser.add_argument("--image-root", required=True, metavar="DIR", help="what the images' names are relative to")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help=f"longest answer; default: {longest}")


def _beams(parser: argparse.ArgumentParser):
    parser.add_argument("--num-beams", type=int, metavar="N", help="beams; default: 5, and 1 is greedy")


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


def run_caption(output, as_json, kind, **options):
    from . import caption as task

    _run(task.evaluate_caption, output or "outputs/eval/caption", as_json, options)


def run_vqa(output, as_json, kind, **options):
    from . import vqa as task

    _run(task.evaluate_vqa, output or "outputs/eval/vqa", as_json, options)


def run_grounding(output, as_json, kind, **options):
    from . import grounding as task

    _run(task.evaluate_grounding, output or "outputs/eval/grounding", as_json, options)


def run_pope(output, as_json, kind, **options):
    from . import pope as task

    _run(task.evaluate_pope, output or "outputs/eval/pope", as_json, options)


def _run(evaluate, output: str, as_json: bool, options: dict):
    given = {name: value for name, value in options.items() if value is not None}
    results, table = evaluate(output=output, **given)
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
