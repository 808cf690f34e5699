"""The page that `make families` writes."""

from importlib.metadata import version

from .texts import COLUMNS as TEXT_COLUMNS
from .towers import COLUMNS as TOWER_COLUMNS
from .verdicts import AS_BASE, NOT_APPLICABLE, REFUSED, RIGHT, WRONG, Row


VERDICTS = (RIGHT, AS_BASE, REFUSED, NOT_APPLICABLE, WRONG)
SIGNS = {RIGHT: "✓", AS_BASE: "=", REFUSED: "–", NOT_APPLICABLE: "·", WRONG: "**wrong**"}
MEANING = {
    "off": "without an adapter, bit for bit the family's own model: logits alone and in a padded batch, and greedy "
    "answers; of a tower, its last hidden state",
    "adapter": "an adapter in both towers acts, on text and on images (from here on with random weights)",
    "gradients": "every trained weight gets a gradient, no frozen one does",
    "checkpointing": "gradient checkpointing gives the same gradients",
    "batch": "rows with and without an image in one batch, as each alone",
    "left": "padded on the left, as alone",
    "right": "padded on the right, as alone",
    "cached": "logits step by step with the cache, as of the whole sequence at once",
    "beams": "beam search in a batch, as alone",
    "sampling": "the same seed gives the same answers",
    "lookup": "prompt lookup answers as greedy decoding",
    "assisted": "with an assistant, as greedy decoding",
    "static": "with a static cache, as with the default one",
    "save": "saved light and full, and loaded again: the same logits",
    "fold": "`merge_modality` for both modalities, and `fold()`: the same logits",
}
INTRODUCTION = """# Any encoder with any decoder

Every language model and every vision tower of the installed transformers in a LaVIN: `make families` makes a tiny
random checkpoint of each from its default configuration, writes it to disk, loads it with a CLIP tower (a tower: with
a Llama), and fills its row. Families of a newer transformers appear by themselves; `tests/test_families.py` runs the
same.

transformers {transformers}, PEFT {peft}, torch {torch}.
"""
HEAD = ("families", "load", "all right", "refused", "not applicable", "cells right", "as the base", "refused", "wrong")


def counts(title: str, rows: list[Row]) -> str:
    """A line of the counts: of whole rows and of cells."""
    whole = {verdict: sum({v for v, _ in row.cells.values()} == {verdict} for row in rows) for verdict in VERDICTS}
    cells = {verdict: sum(v == verdict for row in rows for v, _ in row.cells.values()) for verdict in VERDICTS}
    works = sum(row.cells["off"][0] in (RIGHT, AS_BASE) for row in rows)
    return (
        f"| {title} | {len(rows)} | {works} | {whole[RIGHT]} | {whole[REFUSED]} | {whole[NOT_APPLICABLE]} | "
        + " | ".join(str(cells[verdict]) for verdict in (RIGHT, AS_BASE, REFUSED, WRONG))
        + " |"
    )


def matrix(rows: list[Row], columns) -> list[str]:
    shown = [row for row in rows if not row.whole]
    lines = ["| family | " + " | ".join(columns) + " |", "|---|" + ":-:|" * len(columns)]
    lines += [f"| {row.family} | " + " | ".join(SIGNS[row.cells[c][0]] for c in columns) + " |" for row in shown]
    return lines


def reasons(rows: list[Row], verdict: str, columns) -> list[str]:
    """Each sentence once, with the rows and cells it was said of."""
    groups = {}
    for row in rows:
        for column in columns:
            said, why = row.cells[column]
            if said == verdict:
                why = why.replace(f"{row.family}/", "FAMILY/")
                groups.setdefault(why, {}).setdefault(row.family, []).append(column)
    lines = []
    for why, cells in groups.items():
        by_columns = {}
        for family, own in cells.items():
            by_columns.setdefault("all" if len(own) == len(columns) else ", ".join(own), []).append(family)
        for own, families in by_columns.items():
            lines.append(f"| {', '.join(families)} | {own} | {why} |".replace("\n", " "))
    return lines


def page(texts: list[Row], towers: list[Row]) -> str:
    """Markdown; the same for the same verdicts."""
    versions = {name: version(name) for name in ("transformers", "peft", "torch")}
    lines = [INTRODUCTION.format(**{**versions, "torch": versions["torch"].split("+")[0]})]
    lines += [
        "| | families | load | all right | refused | not applicable | cells right | as the base | refused | wrong |"
    ]
    lines += ["|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|"]
    lines += [counts("language models", texts), counts("vision towers", towers), ""]
    lines += [
        f"{SIGNS[RIGHT]} right; {SIGNS[AS_BASE]} not right, and the base alone is not either; {SIGNS[REFUSED]} refused"
    ]
    lines += [f"with a sentence, below; {SIGNS[NOT_APPLICABLE]} not applicable.", ""]
    lines += [f"- **{name}**: {what}" for name, what in MEANING.items()]
    for title, rows, columns in (("Language models", texts, TEXT_COLUMNS), ("Vision towers", towers, TOWER_COLUMNS)):
        lines += ["", f"## {title}", "", *matrix(rows, columns)]
        for heading, verdict in (
            ("Refused, and what is said", REFUSED),
            ("Not right in the base itself", AS_BASE),
            ("Not applicable", NOT_APPLICABLE),
            ("Wrong", WRONG),
        ):
            if found := reasons(rows, verdict, columns):
                lines += ["", f"{heading}:", "", "| families | columns | |", "|---|---|---|", *found]
    return "\n".join(lines) + "\n"
