"""`lavin eval text`: what the adapter does to plain text, and that switched off it does nothing."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from test_evaluate import fails, lavin_folder  # noqa: F401  (a fixture)
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor, AutoTokenizer

from lavin import LavinForConditionalGeneration
from lavin.recipes.cli import main
from lavin.recipes.evaluate.text import base_alone, choice_accuracy, log_likelihoods, text_windows
from lavin.recipes.quickstart.quickstart import TINY


TEXT = (
    "Question: Which digit is shown? Options: (A) 1 (B) 3 (C) 5. The answer is B. It is a small red ring on grey. " * 9
)
QUESTIONS = [
    {"question": "Which is a colour?", "choices": ["red", "ring", "three small rings"], "answer": 0},
    {"question": "Which is a digit?", "choices": ["a blue cross", "7"], "answer": 1},
    {"question": "What is shown?", "choices": ["grey", "The answer is B.", "x"], "answer": 1},
]


@pytest.fixture
def files(tmp_path):
    (tmp_path / "plain.txt").write_text(TEXT)
    rows = [*QUESTIONS, {"text": "It shows one small blue cross on grey."}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(tmp_path / "plain.txt"), str(tmp_path / "rows.jsonl")]


def by_hand(model, tokenizer, text: str, given: str = "") -> list[float]:
    """Log-probabilities of the tokens after `given`, one forward without padding."""
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]
    start = 1 + len(tokenizer(given, add_special_tokens=False).input_ids)
    with torch.no_grad():
        scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [scores[i - 1, ids[i]].item() for i in range(start, len(ids))]


def test_three_models_side_by_side(lavin_folder, files, tmp_path, capsys):  # noqa: F811
    command = ["eval", "text", "--model", str(lavin_folder), "--data", *files, "--output", str(tmp_path / "out")]
    assert main([*command, "--max-length", "100", "--batch-size", "3"]) == 0
    shown = capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    base, adapted, off = results["table"]
    assert [row[""] for row in results["table"]] == ["base alone", "adapter on text", "adapter off"]
    assert "Adapter off and base alone: equal bit for bit, at each token." in shown and results["bit_equal"]
    assert results["tokens_equal"] == results["tokens"] > 250
    assert {**base, "": ""} == {**off, "": ""} and base["perplexity"] != adapted["perplexity"]
    assert "per character of a choice" in shown and "pieces of up to 100 tokens" in shown
    # Against single forwards of the plain checkpoint. Pieces do not overlap.
    plain = AutoModelForCausalLM.from_pretrained(TINY / "text", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(TINY / "text")
    total, count = 0.0, 0
    for document in (TEXT, "It shows one small blue cross on grey."):
        ids = tokenizer(document, add_special_tokens=False).input_ids
        for i in range(0, len(ids), 99):
            window = torch.tensor([[tokenizer.bos_token_id, *ids[i : i + 99]]])
            with torch.no_grad():
                total += plain(window, labels=window).loss.item() * (window.shape[1] - 1)
            count += window.shape[1] - 1
    assert base["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    right = 0
    for question in QUESTIONS:
        context = f"Question: {question['question']}\nAnswer:"
        likely = [sum(by_hand(plain, tokenizer, f"{context} {c}", context)) / len(c) for c in question["choices"]]
        right += likely.index(max(likely)) == question["answer"]
    assert base["accuracy"] == pytest.approx(100 * right / 3)
    # The adapter's numbers are those of the model as a user calls it.
    model = LavinForConditionalGeneration.from_pretrained(lavin_folder, dtype=torch.float32).eval()
    windows = text_windows(tokenizer, [TEXT], 100)
    (scores,) = log_likelihoods(model, windows[:1], 1, "x")
    assert scores.tolist() == pytest.approx(by_hand(model, tokenizer, tokenizer.decode(windows[0][0][1:])), abs=1e-4)


def test_accuracy_is_per_character():
    """-6 over 3 characters is worse than -8 over 8, and better than -9 over 4."""
    questions = [{"choices": ["abc", "abcdefgh"], "answer": 1}, {"choices": ["abc", "abcd"], "answer": 1}]
    scores = [torch.tensor([-6.0]), torch.tensor([-4.0, -4.0]), torch.tensor([-6.0]), torch.tensor([-9.0])]
    assert choice_accuracy(questions, scores) == 50.0


@pytest.mark.parametrize("full", [False, True], ids=["light", "full"])
def test_disabled_is_the_base_bit_for_bit(lavin_folder, tmp_path, full):  # noqa: F811
    """All logits, not only those of the text's own tokens."""
    folder = lavin_folder
    if full:
        folder = tmp_path / "full"
        AutoModel.from_pretrained(lavin_folder, dtype=torch.float32).save_pretrained(folder, full=True)
        AutoProcessor.from_pretrained(lavin_folder).save_pretrained(folder)
    model = LavinForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    plain = base_alone(model)
    assert type(plain).__name__ == "LlamaForCausalLM"
    ids = torch.tensor([[1, 9, 40, 77, 8], [1, 5, 6, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    with torch.inference_mode():
        expected = plain(input_ids=ids, attention_mask=mask).logits
        adapted = model(input_ids=ids, attention_mask=mask).logits
        model.disable_adapters()
        off = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(off, expected) and not torch.equal(adapted, expected)


def test_bad_text_data(lavin_folder, tmp_path, capsys):  # noqa: F811
    def command(content, name="x.jsonl", model=lavin_folder):
        (tmp_path / name).write_text(content)
        return ["eval", "text", "--model", model, "--data", tmp_path / name, "--output", tmp_path / "out"]

    fails(capsys, command("", "x.txt"), "no text and no question")
    fails(capsys, command("{}\n"), "line 1", '"question"')
    fails(capsys, command('{"text": "a"}\n{"question": "q", "choices": ["a"], "answer": 1}'), "line 2", "no index")
    fails(capsys, [*command("x")[:-4], "--data", tmp_path / "nothing.txt"], "There is no file")
    from lavin.recipes.init import init_folder

    light = init_folder(TINY / "vision", TINY / "text", tmp_path / "light")
    fails(capsys, command("Some words.", "x.txt", light), "has no adapter", "nothing to compare")


@pytest.mark.slow
def test_text_in_a_fresh_process(lavin_folder, files, tmp_path):  # noqa: F811
    command = [
        sys.executable,
        "-m",
        "lavin.recipes.cli",
        "eval",
        "text",
        "--model",
        str(lavin_folder),
        "--data",
        *files,
        "--json",
    ]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)
    assert set(scores) == {"perplexity", "perplexity (base alone)", "accuracy", "accuracy (base alone)"}
    assert json.loads((tmp_path / "outputs" / "eval" / "text" / "results.json").read_text())["bit_equal"]
