"""`make families`: any encoder with any decoder; no cell of the table is wrong."""

import pytest
from families.shrink import text_families, tower_families
from families.table import page
from families.verdicts import AS_BASE, REFUSED, RIGHT, Row, judge
from families.walk import Walk
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES


# What transformers' own models do that is deprecated is no fault of LaVIN's, and must not change a verdict.
pytestmark = [pytest.mark.filterwarnings(f"default::{kind}") for kind in ("FutureWarning", "DeprecationWarning")]
FAST = ("llama", "qwen3_5_text")
ANY_TOWER = sorted({name[0] for name in MODEL_MAPPING_NAMES.keys() - MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()})


@pytest.fixture(scope="module")
def walk():
    with Walk() as walk:
        yield walk


def check(row: Row):
    print(row.family, *row.lines(), sep="\n    ")
    assert not row.wrong, row.wrong


@pytest.mark.parametrize("family", [name for name in FAST if name in text_families()])
def test_a_language_model(walk, family):
    row, _ = walk.row("text", family)
    check(row)
    assert row.cells["off"] == row.cells["batch"] == row.cells["save"] == (RIGHT, "")


@pytest.mark.parametrize("family", ["clip_vision_model", "siglip_vision_model"])
def test_a_tower(walk, family):
    row, _ = walk.row("tower", family)
    check(row)
    assert {verdict for verdict, _ in row.cells.values()} == {RIGHT}


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in text_families() if name not in FAST])
def test_every_language_model(walk, family):
    check(walk.row("text", family)[0])


@pytest.mark.slow
@pytest.mark.parametrize("letter", ANY_TOWER)
def test_every_tower(walk, letter):
    """By the first letters of their names: which of the hundreds of models are towers takes a while to find out."""
    names = [name for name in MODEL_MAPPING_NAMES if name.startswith(letter)]
    wrong = {}
    for family in tower_families(names):
        row, _ = walk.row("tower", family)
        print(row.family, *row.lines(), sep="\n    ")
        wrong.update({family: row.wrong} if row.wrong else {})
    assert not wrong


@pytest.mark.slow
def test_a_stateful_language_model_is_not_decoded_with_drafts(walk):
    """Its state cannot go back to before a draft that was wrong: transformers refuses, for the base and for LaVIN."""
    row, _ = walk.row("text", "jamba")
    check(row)
    for column in ("lookup", "assisted"):
        verdict, why = row.cells[column]
        assert verdict == REFUSED and why.startswith("as the base: assisted generation is not supported with stateful")


def test_what_is_wrong_is_said():
    """Off where the base is right, a crash, an answer that the base refuses; and what is no fault of LaVIN's."""

    def refuses():
        raise RuntimeError("cannot do that")

    cases = {
        "right": (lambda: 0.0, None, RIGHT),
        "off": (lambda: 1.0, lambda: 0.0, "wrong"),
        "nan": (lambda: float("inf"), None, "wrong"),
        "both off": (lambda: 1.0, lambda: 1.0, AS_BASE),
        "crash": (refuses, lambda: 0.0, "wrong"),
        "both refuse": (refuses, refuses, REFUSED),
        "answers": (lambda: 0.0, refuses, "wrong"),
    }
    row = Row("any")
    for column, (ours, theirs, _) in cases.items():
        judge(row, column, ours, theirs, refuses=theirs)
    assert {column: row.cells[column][0] for column in cases} == {column: case[2] for column, case in cases.items()}
    assert "cannot do that" in row.cells["both refuse"][1] and "test_families.py" in row.cells["crash"][1]


@pytest.mark.slow
def test_the_page(walk):
    """It is the same each time, has the counts, and every sentence that refuses a family."""
    texts = [walk.row("text", name)[0] for name in ("llama", "gemma2", "git")]
    towers = [walk.row("tower", "clip_vision_model")[0]]
    text = page(texts, towers)
    assert text == page([walk.row("text", name)[0] for name in ("llama", "gemma2", "git")], towers)
    assert "| language models | 3 | 1 | 1 |" in text and "| vision towers | 1 | 1 | 1 |" in text
    assert "| gemma2 | all | text is no language model for a LaVIN (its type is gemma2)" in text and "/tmp" not in text
