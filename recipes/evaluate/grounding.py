"""Visual grounding: the share of phrases whose box is hit, at an IoU of at least 0.5."""

import os
from pathlib import Path

from ..data.grounding import Grounding
from ..report import markdown_table, percent
from .boxes import draw_boxes, iou, parse_box
from .run import ask_model, write_results


HIT = 0.5
PICTURE = "boxes.png"


def evaluate_grounding(
    model: str | os.PathLike,
    inputs: list[str | os.PathLike],
    image_root: str | os.PathLike,
    output: str | os.PathLike,
    max_new_tokens: int = 64,
    **options,
) -> tuple[dict, str]:
    """
    Asks a model for the box of each phrase, scores its answers and draws some of them.

    Args:
        model (`str` or `os.PathLike`): A LaVIN folder or Hub name.
        inputs, image_root: As of [`Grounding`]; each file gets a score of its own.
        output (`str` or `os.PathLike`): The folder for answers, results and `boxes.png`.
        max_new_tokens (`int`, *optional*, defaults to 64): Longest answer; greedy.
        options: `batch_size`, `device`, `dtype` of [`~run.ask_model`].

    Returns:
        `tuple(dict, str)`: what `results.json` holds, and the table.
    """
    asked = Grounding(inputs, image_root).questions()
    records, run = ask_model(model, asked, output, "grounding", {}, max_new_tokens=max_new_tokens, **options)
    items = [
        {"image": question["images"][0], "phrase": question["phrase"], "truth": question["expected"],
         "box": parse_box(records[question["id"]]["answer"]), "group": question["group"]}
        for question in asked
    ]  # fmt: skip
    overlaps = [iou(item["truth"], item["box"]) for item in items]
    scores, table_rows = {}, []
    for group in [*dict.fromkeys(item["group"] for item in items), None]:
        chosen = [o for o, item in zip(overlaps, items, strict=True) if group in (None, item["group"])]
        if group is None and len(table_rows) == 1:
            continue  # one file: no total
        scores[group or "AVG"] = percent([overlap >= HIT for overlap in chosen])
        table_rows.append(
            {"file": group or "all", "IoU >= 0.5": scores[group or "AVG"],
             "mean IoU": round(100 * sum(chosen) / len(chosen), 2), "phrases": len(chosen)}
        )  # fmt: skip
    lost = sum(item["box"] is None for item in items)
    results = {
        "task": "grounding",
        "dataset": {
            "name": ", ".join(Path(path).stem for path in inputs), "hub": None, "split": None,
            "questions": len(asked),
        },
        "scores": scores,
        "metric_types": dict.fromkeys(scores, "accuracy_at_iou_0.5"),
        "mean_iou": table_rows[-1]["mean IoU"],
        "unparsable": lost,
        **run,
    }  # fmt: skip
    picture = draw_boxes(items, Path(output, PICTURE))
    table = "\n".join(
        ["Phrases whose box is hit, in percent:", "", markdown_table(table_rows), "",
         f"{lost} of {len(asked)} answers hold no box; they count as wrong. Boxes on their images: {picture}"]
    )  # fmt: skip
    return write_results(output, results, table), table
