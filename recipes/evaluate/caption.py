"""Captions: CIDEr, BLEU-4 and ROUGE-L by pycocoevalcap, METEOR where there is Java."""

import contextlib
import os
import shutil
from collections import Counter

from ..data.captions import PROMPT, Captions
from ..report import markdown_table
from .ptb import ptb_words
from .run import ask_model, check_positive, write_results


def score_captions(answers: dict[str, str], references: dict[str, list[str]]) -> dict[str, float]:
    """
    Scores captions as COCO does.

    Args:
        answers (`dict[str, str]`): One caption for each image.
        references (`dict[str, list[str]]`): What people said of the same images.

    Returns:
        `dict[str, float]`: `CIDEr`, `BLEU-4`, `ROUGE-L` and, where `java` is found, `METEOR`; all times 100.

    Raises:
        `ImportError`: if pycocoevalcap is not installed.
    """
    try:
        from pycocoevalcap.bleu.bleu import Bleu
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise ImportError('Captions are scored by pycocoevalcap: pip install "lavin[eval]".') from error
    wanted = {name: [" ".join(ptb_words(text)) for text in texts] for name, texts in references.items()}
    given = {name: [" ".join(ptb_words(answers[name]))] for name in references}
    scores = {
        "CIDEr": Cider().compute_score(wanted, given)[0],
        "BLEU-4": Bleu(4).compute_score(wanted, given, verbose=0)[0][3],
        "ROUGE-L": Rouge().compute_score(wanted, given)[0],
    }
    if shutil.which("java"):
        from pycocoevalcap.meteor.meteor import Meteor

        with contextlib.suppress(OSError, ValueError):  # a Java that does not run
            meteor = Meteor()
            try:
                scores["METEOR"] = meteor.compute_score(wanted, given)[0]
            finally:
                if meteor.lock.locked():  # it failed, and when it is deleted it would wait for this for ever
                    meteor.lock.release()
    return {name: round(100 * float(value), 2) for name, value in scores.items()}


def most_frequent(captions: list[str]) -> str:
    """The caption that is written most often, the first of them where several are."""
    return Counter(captions).most_common(1)[0][0]


def evaluate_caption(
    model: str | os.PathLike,
    annotations: str | os.PathLike,
    image_root: str | os.PathLike,
    output: str | os.PathLike,
    split: str = "test",
    prompt: str = PROMPT,
    max_new_tokens: int | None = None,
    num_beams: int = 5,
    min_new_tokens: int = 8,
    **options,
) -> tuple[dict, str]:
    """
    Has a model describe images and scores what it says.

    Args:
        model (`str` or `os.PathLike`): A LaVIN folder or Hub name.
        annotations, image_root, split, prompt: As of [`Captions`].
        output (`str` or `os.PathLike`): The folder for answers and results.
        max_new_tokens, num_beams, min_new_tokens (`int`, *optional*, default to 30, 5 and 8): As InfMLLM.
        options: `batch_size`, `device`, `dtype` of [`~run.ask_model`].

    Returns:
        `tuple(dict, str)`: what `results.json` holds, and the table.
    """
    check_positive(num_beams=num_beams)
    source = Captions(annotations, image_root, split, prompt)
    asked = source.questions()
    decoding = {"num_beams": num_beams} if num_beams > 1 else {}
    decoding |= {"min_new_tokens": min_new_tokens} if min_new_tokens else {}
    if max_new_tokens is None:
        max_new_tokens = 30
    records, run = ask_model(
        model, asked, output, "caption", {}, max_new_tokens=max_new_tokens, decoding=decoding, **options
    )
    answers = {question["id"]: records[question["id"]]["answer"] for question in asked}
    scores = score_captions(answers, {question["id"]: question["expected"] for question in asked})
    name = f"{source.file.stem} {split}" if source.karpathy else source.file.stem
    results = {
        "task": "caption",
        "dataset": {"name": name, "hub": None, "split": split if source.karpathy else None, "questions": len(asked)},
        "scores": scores,
        "metric_types": {key: key.lower() for key in scores},
        "empty": sum(not ptb_words(answer) for answer in answers.values()),
        **run,
    }
    lines = [f"{name}, {len(asked)} images:", "", markdown_table([scores])]
    if "METEOR" not in scores:
        lines += ["", "No METEOR: it needs Java."]
    if results["empty"]:
        lines += ["", f"{results['empty']} captions have no word."]
    table = "\n".join(lines)
    return write_results(output, results, table), table
