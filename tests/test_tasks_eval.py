"""`lavin eval caption|vqa|grounding|pope`: the published scores by hand, published decoding, boxes drawn, the card."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import task_files
from PIL import Image
from test_evaluate import lavin_folder  # noqa: F401  (fixture)

from lavin.recipes.card import card_folder
from lavin.recipes.cli import main
from lavin.recipes.evaluate import answers as core
from lavin.recipes.evaluate.caption import score_captions
from lavin.recipes.evaluate.pope import says_yes, score_pope
from lavin.recipes.evaluate.ptb import ptb_words
from lavin.recipes.evaluate.vqa import exact_match, normalise, vqa_score


PTB = Path(__file__).parent / "fixtures/ptb_captions.json"


@pytest.fixture
def no_java(monkeypatch):
    """A PATH on which there is no Java."""
    bare = os.pathsep.join(
        folder for folder in os.environ["PATH"].split(os.pathsep) if not Path(folder, "java").exists()
    )
    monkeypatch.setenv("PATH", bare)
    assert shutil.which("java") is None


# ---- captions


def test_words_are_those_of_stanfords_tokenizer():
    """Captions with what trips a tokenizer, and what Java's PTBTokenizer 3.4.1 and COCO's list make of them."""
    cases = json.loads(PTB.read_text(encoding="utf-8"))
    assert len(cases) > 80
    for caption, words in cases:
        assert " ".join(ptb_words(caption)) == words, caption


def test_captions_by_hand(no_java):
    """
    Two images, one reference each; all n-grams of a reference occur in one image of two, so each weighs log 2, as does
    an n-gram that no reference has. First image: 3 of 4 words, 2 of 3 pairs, 1 of 2 triples, 0 of 1 fours are right.
    """
    references = {"a": ["One two three four."], "b": ["Five, six seven eight"]}
    scores = score_captions({"a": "one two three nine", "b": "FIVE six, seven eight!"}, references)
    assert set(scores) == {"CIDEr", "BLEU-4", "ROUGE-L"}  # METEOR needs Java
    first = 10 * (3 / 4 + 2 / 3 + 1 / 2 + 0) / 4
    assert scores["CIDEr"] == pytest.approx(100 * (first + 10) / 2, abs=0.01)
    assert scores["BLEU-4"] == pytest.approx(100 * (7 / 8 * 5 / 6 * 3 / 4 * 1 / 2) ** 0.25, abs=0.01)
    assert scores["ROUGE-L"] == pytest.approx(100 * (3 / 4 + 1) / 2, abs=0.01)


def test_a_short_caption_by_hand(no_java):
    """
    CIDEr: a Gaussian of the difference of lengths in pairs, sigma 6. BLEU: exp(1 - reference / caption) of all
    lengths. ROUGE-L: F with beta 1.2.
    """
    references = {"a": ["one two three four five six"], "b": ["seven eight nine ten"]}
    scores = score_captions({"a": "one two three four", "b": "seven eight nine ten"}, references)
    penalty = math.exp(-(2**2) / (2 * 6**2))
    cosines = [
        matched / math.sqrt(said * meant) for matched, said, meant in ((4, 4, 6), (3, 3, 5), (2, 2, 4), (1, 1, 3))
    ]
    assert scores["CIDEr"] == pytest.approx(100 * (10 * penalty * sum(cosines) / 4 + 10) / 2, abs=0.01)
    assert scores["BLEU-4"] == pytest.approx(100 * math.exp(1 - 10 / 8), abs=0.01)
    recall = 4 / 6
    f = (1 + 1.2**2) * recall / (recall + 1.2**2)
    assert scores["ROUGE-L"] == pytest.approx(100 * (f + 1) / 2, abs=0.01)


# ---- questions


@pytest.mark.parametrize(
    "answer, compared",
    [
        ("The  Dog.", "dog"),
        ("two dogs", "2 dogs"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("couldn'tve", "couldn't've"),
        ("black/white", "black white"),  # punctuation between words is a space
        ("black, white", "black white"),  # beside a space it is nothing
        ("1,000", "1000"),
        ("1,000 t-shirts", "1000 tshirts"),  # with a comma in a number it is nothing everywhere
        ("3.5 ft.", "3.5 ft"),
        ("U.S.", "us"),
        ("an  apple\nand\ta pear ", "apple and pear"),
        ('what\'s "that"?', "what's that"),
        ("yes", "yes"),
    ],
)
def test_answers_as_the_official_scorer_compares_them(answer, compared):
    assert normalise(answer) == compared


def test_the_official_score_by_hand():
    """Of ten people, so many said it: the mean of min(1, others / 3) when each is left out in turn."""
    for said, score in ((0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (9, 1.0)):
        given = ["red"] * said + [f"colour {n}" for n in range(10 - said)]
        assert vqa_score("Red.", given) == pytest.approx(score), said
    assert vqa_score("two", ["2"] * 2 + ["two"] + ["three"] * 7) == pytest.approx(0.9)  # both are 2
    assert vqa_score("Yes", ["yes"] * 10) == 0 and vqa_score(" yes\n", ["yes"] * 10) == 1  # all alike: as they stand
    assert exact_match(" Jane roe ", ["Jane Roe"]) == 1 and exact_match("Jane", ["Jane Roe"]) == 0


# ---- POPE


def test_yes_or_no_as_popes_own_scorer_reads_it():
    for text in ("no", "No, there is none", "There is not, no", "I see no dog. Yes."):
        assert not says_yes(text), text
    for text in ("yes", "Yes. No doubt", "None", "NO", "nothing there", ""):  # its own rule, faults included
        assert says_yes(text), text


def test_popes_measures_by_hand():
    """3 hits, 1 false alarm, 2 misses, 4 rightly denied."""
    said = [True] * 4 + [False] * 6
    wanted = [True] * 3 + [False] + [True] * 2 + [False] * 4
    scores = score_pope(said, wanted)
    assert scores == {"accuracy": 70.0, "precision": 75.0, "recall": 60.0, "F1": 66.67, "yes": 40.0}
    assert score_pope([False], [True]) == {"accuracy": 0, "precision": 0, "recall": 0, "F1": 0, "yes": 0}


# ---- the commands


@pytest.fixture
def saying(monkeypatch):
    """Gives the models of a test its own answers, by their prompts; returns what they were asked and how."""
    seen = {}

    def make(replies: dict[str, str]):
        def generate(model, processor, prompts, images, batch_size, max_new_tokens, **decoding):
            seen.update(prompts=prompts, images=images, max_new_tokens=max_new_tokens, **decoding)
            for i, prompt in enumerate(prompts):
                yield [i], [next(reply for part, reply in replies.items() if part in prompt)]

        monkeypatch.setattr(core, "generate_batches", generate)
        return seen

    return make


def evaluate(capsys, output, *arguments) -> tuple[dict, str]:
    assert main(["eval", *map(str, arguments), "--output", str(output)]) == 0
    table = capsys.readouterr().out
    assert (output / "results.md").read_text().strip() in table and (output / "predictions.jsonl").is_file()
    return json.loads((output / "results.json").read_text()), table


def card(folder: Path, output: Path) -> str:
    """The card that takes a task's results."""
    copy = shutil.copytree(folder, output / "model")
    return card_folder(copy, results=[str(output / "results.json")]).read_text()


def test_vqa_through_the_command(lavin_folder, saying, tmp_path, capsys):  # noqa: F811
    questions, answers = task_files.vqa(tmp_path)
    seen = saying({"colour": "The dark-red", "Is it red": "yes", "How many": "three"})
    line = ("vqa", "--model", lavin_folder, "--questions", questions, "--annotations", answers, "--image-root",
            tmp_path / "images")  # fmt: skip
    results, _ = evaluate(capsys, tmp_path / "out", *line)
    # "dark-red" becomes "dark red", which four said; of "3" there are two
    assert results["scores"] == {"number": 60.0, "other": 100.0, "yes/no": 100.0, "AVG": 86.67}
    assert seen["prompts"][0] == "Question:What colour is it? Short answer:"
    assert (seen["num_beams"], seen["length_penalty"], seen["max_new_tokens"]) == (5, 0.0, 10)
    assert results["settings"]["num_beams"] == 5 and results["asked"] == 3
    results, _ = evaluate(capsys, tmp_path / "out", *line)  # again: nothing is asked
    assert results["asked"] == 0 and results["scores"]["AVG"] == 86.67
    assert "| 60.00 | 100.00 | 100.00 | 86.67 |" in card(lavin_folder, tmp_path / "out")


def test_exact_match_through_the_command(lavin_folder, saying, tmp_path, capsys):  # noqa: F811
    seen = saying({"Who wrote": "jane roe", "Is it old": "No, it is not"})
    line = ("vqa", "--model", lavin_folder, "--questions", task_files.ocrvqa(tmp_path), "--image-root", tmp_path)
    results, table = evaluate(capsys, tmp_path / "out", *line, "--num-beams", 1)
    assert results["scores"] == {"AVG": 50.0} and "exact match" in table and results["dataset"]["questions"] == 2
    assert seen["max_new_tokens"] == 100 and "num_beams" not in seen


def test_grounding_through_the_command(lavin_folder, saying, tmp_path, capsys):  # noqa: F811
    files = [task_files.mdetr(tmp_path), task_files.qwen(tmp_path)]
    seen = saying({"the lady": "(0.5,0.75),(0.1,0.3)", "all of it": "It is everywhere."})
    results, table = evaluate(
        capsys, tmp_path / "out", "grounding", "--model", lavin_folder, "--input", files[0], "--input", files[1],
        "--image-root", tmp_path,
    )  # fmt: skip
    assert results["scores"] == {"finetune_refcoco_testA": 50.0, "refcoco_testB": 100.0, "AVG": 66.67}
    assert results["unparsable"] == 1 and "1 of 3 answers hold no box; they count as wrong" in table
    assert results["mean_iou"] == pytest.approx(100 * 2 * 0.9 / 3, abs=0.01)  # 0.4 x 0.45 of 0.4 x 0.5
    assert "num_beams" not in seen and Image.open(tmp_path / "out/boxes.png").size[0] == 3 * 208 + 8
    assert "| 50.00 | 100.00 | 66.67 |" in card(lavin_folder, tmp_path / "out")


def test_pope_through_the_command(lavin_folder, saying, tmp_path, capsys):  # noqa: F811
    files = [task_files.pope(tmp_path, name) for name in ("random", "popular", "adversarial")]
    saying({"thing 1": "Yes.", "thing 2": "Yes, there is.", "thing 3": "Perhaps", "thing 4": "no"})
    line = ["pope", "--model", lavin_folder, "--image-root", tmp_path]
    results, table = evaluate(capsys, tmp_path / "all", *line, *(part for file in files for part in ("--input", file)))
    row = {"accuracy": 75.0, "precision": 66.67, "recall": 100.0, "F1": 80.0, "yes": 75.0, "questions": 4}
    assert results["categories"] == dict.fromkeys(("random", "popular", "adversarial"), row)
    assert results["scores"]["F1"] == 80.0 and results["neither"] == 3 and "Mean F1: 80.00" in table
    assert "| 80.00 | 80.00 | 80.00 | 80.00 |" in card(lavin_folder, tmp_path / "all")
    results, table = evaluate(capsys, tmp_path / "one", *line, "--input", files[1])
    assert results["scores"] == {"F1 popular": 80.0} and "No mean F1" in table


@pytest.mark.slow
def test_captions_in_a_fresh_process_without_java_and_into_the_card(lavin_folder, no_java, tmp_path):  # noqa: F811
    """The model's own words this time: five beams, 8 to 30 tokens, and a card that takes the result."""
    command = [sys.executable, "-m", "lavin.recipes.cli", "eval", "caption", "--model", lavin_folder, "--annotations",
               task_files.coco_captions(tmp_path), "--image-root", tmp_path / "val2014", "--output", tmp_path / "out",
               "--json"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert json.loads(done.stdout) == results["scores"] and set(results["scores"]) == {"CIDEr", "BLEU-4", "ROUGE-L"}
    assert "No METEOR: it needs Java." in (tmp_path / "out/results.md").read_text()
    for key, value in {"num_beams": 5, "min_new_tokens": 8, "max_new_tokens": 30}.items():
        assert results["settings"][key] == value
    said = [json.loads(line) for line in (tmp_path / "out/predictions.jsonl").read_text().splitlines()[1:]]
    assert {record["id"] for record in said} == {"9", "25"} and all(record["answer"].strip() for record in said)
    text = card(lavin_folder, tmp_path / "out")
    assert "captions_val2014" in text and "CIDEr" in text and "num_beams 5" in text
