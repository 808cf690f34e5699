"""Visual question answering: VQA's official score (VQAv2, OK-VQA, TextVQA), exact match (GQA, OCR-VQA)."""

import os
import re

from ..data.vqa import VQA
from ..report import markdown_table
from .run import ask_model, check_positive, write_results


# ---- what the official scorer (vqaEval.py of visualqa.org) does to an answer, its faults included
MARKS = ';/[]"{}()=+\\_-><@`,?!'
COMMA = re.compile(r"\d,\d")
FULL_STOP = re.compile(r"\.(?!\d)")  # its look-behind is misspelt and never fails
STOPS = 32  # and a flag stands where the number of replacements goes: so many at most
NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
ARTICLES = ("a", "an", "the")
CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've "
    "weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've "
    "why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're "
    "you've"
)
# Each with one of its apostrophes left out is what the scorer mends; the last one it spoils.
MENDED = {
    word[:at] + word[at + 1 :]: word for word in CONTRACTIONS.split() for at, mark in enumerate(word) if mark == "'"
}
MENDED.update({"somebody'd": "somebodyd"})


def normalise(answer: str) -> str:
    """An answer as the official scorer compares it: without punctuation and articles, numbers as digits."""
    answer = tidy(answer)
    close = COMMA.search(answer) is not None
    text = answer
    for mark in MARKS:
        text = text.replace(mark, "" if close or f"{mark} " in answer or f" {mark}" in answer else " ")
    text = FULL_STOP.sub("", text, count=STOPS)
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(MENDED.get(word, word) for word in words if word not in ARTICLES)


def tidy(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def vqa_score(answer: str, given: list[str]) -> float:
    """
    VQA's score of one answer: the mean, over all but one of the people asked, of min(1, how many said so / 3).

    Args:
        answer (`str`): The model's.
        given (`list[str]`): The people's, usually ten. Where all are equal, nothing is normalised, as in the scorer.

    Returns:
        `float`: 0 to 1.
    """
    given, answer = [tidy(other) for other in given], tidy(answer)
    if len(set(given)) > 1:
        given, answer = [normalise(other) for other in given], normalise(answer)
    same = [other == answer for other in given]
    return sum(min(1.0, (sum(same) - own) / 3) for own in same) / len(same)


def exact_match(answer: str, given: list[str]) -> float:
    """Whether the answer is one of those given, without regard to case and surrounding space."""
    return float(answer.strip().lower() in {other.strip().lower() for other in given})


def evaluate_vqa(
    model: str | os.PathLike,
    questions: str | os.PathLike,
    image_root: str | os.PathLike,
    output: str | os.PathLike,
    annotations: str | os.PathLike | None = None,
    split: str = "test",
    max_new_tokens: int | None = None,
    num_beams: int = 5,
    **options,
) -> tuple[dict, str]:
    """
    Asks a model a file of questions on images and scores its answers.

    Args:
        model (`str` or `os.PathLike`): A LaVIN folder or Hub name.
        questions, image_root, annotations, split: As of [`VQA`].
        output (`str` or `os.PathLike`): The folder for answers and results.
        max_new_tokens (`int`, *optional*): 10 by default, 100 for OCR-VQA, as InfMLLM.
        num_beams (`int`, *optional*, defaults to 5): Beams, with length penalty 0, as InfMLLM; 1 is greedy.
        options: `batch_size`, `device`, `dtype` of [`~run.ask_model`].

    Returns:
        `tuple(dict, str)`: what `results.json` holds, and the table.
    """
    check_positive(num_beams=num_beams)
    source = VQA(questions, image_root, annotations, split)
    asked = source.questions()
    decoding = {"num_beams": num_beams, "length_penalty": 0.0} if num_beams > 1 else {}
    if max_new_tokens is None:
        max_new_tokens = 100 if source.kind == "OCR-VQA" else 10
    records, run = ask_model(
        model, asked, output, "vqa", {}, max_new_tokens=max_new_tokens, decoding=decoding, **options
    )
    official = source.kind in ("VQA", "TextVQA")
    score = vqa_score if official else exact_match
    scored = [score(records[question["id"]]["answer"], question["expected"]) for question in asked]
    groups = {question["group"] for question in asked} - {None}
    scores = {
        group: mean([s for s, question in zip(scored, asked, strict=True) if question["group"] == group])
        for group in sorted(groups)
    }
    scores["AVG"] = mean(scored)
    metric = "VQA score (leave one out)" if official else "exact match"
    results = {
        "task": "vqa",
        "dataset": {"name": source.title, "hub": None, "split": source.split, "questions": len(asked)},
        "scores": scores,
        "metric_types": dict.fromkeys(scores, "vqa_score" if official else "exact_match"),
        "metric": metric,
        **run,
    }
    table = f"{source.title}, {len(asked)} questions, {metric} in percent:\n\n{markdown_table([scores])}"
    return write_results(output, results, table), table


def mean(scores: list[float]) -> float:
    """In percent, rounded as the official scorer prints it."""
    return round(100 * sum(scores) / len(scores), 2)
