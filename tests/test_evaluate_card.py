"""`lavin card --results`: measured numbers in the card, of this adapter only."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, parse_eval_result_entries
from test_cli import TRL_CARD
from test_evaluate import data, lavin_folder  # noqa: F401  (fixtures)
from transformers import AutoModel

from lavin.card_lavin import adapter_digest
from lavin.recipes.cli import main


HUB = "derek-thomas/ScienceQA"


@pytest.fixture
def trained(lavin_folder, tmp_path):  # noqa: F811
    """An adapter repository over which a trainer has written its card."""
    folder = tmp_path / "trained"
    AutoModel.from_pretrained(lavin_folder).save_pretrained(folder)
    (folder / "README.md").write_text(TRL_CARD)
    return folder


def results(folder: Path, path: Path, task: str = "scienceqa", hub: str | None = HUB, **scores) -> str:
    """A `results.json` as `lavin eval` writes it (`test_evaluate*.py` show that it does)."""
    content = {
        "task": task, "dataset": {"name": f"{task} (test)", "hub": hub, "split": "test", "questions": 4241},
        "scores": scores, "benchmark": {task: scores.get("AVG")} if hub else {}, "unparsable": 0,
        "model": {"name": str(folder), "adapter": adapter_digest(folder)},
        "settings": {"format": "QCM-ALE", "mode": "generate"}, "date": "2026-01-02T03:04:05Z",
    }  # fmt: skip
    path.write_text(json.dumps(content))
    return str(path)


def measured(folder: Path) -> dict[tuple[str, str], float]:
    """What the Hub's own reader finds in the card."""
    found = ModelCard.load(folder / "README.md").data.eval_results or []
    return {(result.dataset_name, result.metric_name): result.metric_value for result in found}


def test_results_of_several_tasks_stand_side_by_side(trained, tmp_path, capsys):
    sqa = results(trained, tmp_path / "sqa.json", NAT=89.25, SOC=None, AVG=89.41)
    assert main(["card", str(trained), "--results", sqa]) == 0
    card = (trained / "README.md").read_text()
    assert measured(trained) == {("scienceqa (test)", "NAT"): 89.25, ("scienceqa (test)", "AVG"): 89.41}
    assert "Trainable parameters" in card and "generated_from_trainer" not in card
    assert "| NAT | AVG |\n| ---: | ---: |\n| 89.25 | 89.41 |" in card and "format QCM-ALE, mode generate" in card
    file = trained / ".eval_results" / "scienceqa.yaml"
    (entry,) = parse_eval_result_entries(yaml.safe_load(file.read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == (HUB, "scienceqa", 89.41)
    assert entry.date == "2026-01-02T03:04:05Z" and "QCM-ALE" in entry.notes
    # Again, and without --results: nothing changes.
    for more in (["--results", sqa], []):
        assert main(["card", str(trained), *more]) == 0 and (trained / "README.md").read_text() == card
    # Another task comes beside it, a new measurement of the same in its place.
    own = results(trained, tmp_path / "own.json", "mine", None, AVG=50.0)
    sqa = results(trained, tmp_path / "sqa.json", NAT=90.0, AVG=91.0)
    assert main(["card", str(trained), "--results", own, sqa]) == 0
    assert measured(trained) == {
        ("mine (test)", "AVG"): 50.0, ("scienceqa (test)", "NAT"): 90.0, ("scienceqa (test)", "AVG"): 91.0,
    }  # fmt: skip
    assert [path.name for path in (trained / ".eval_results").iterdir()] == ["scienceqa.yaml"]
    assert yaml.safe_load(file.read_text())[0]["value"] == 91.0
    # What the user wrote stays; saving the same adapter elsewhere takes the results along.
    text = (trained / "README.md").read_text().replace("# LaVIN", "# Mine", 1)
    (trained / "README.md").write_text(text)
    assert main(["card", str(trained)]) == 0 and (trained / "README.md").read_text() == text
    AutoModel.from_pretrained(trained).save_pretrained(tmp_path / "copy")
    assert measured(tmp_path / "copy") == measured(trained)


def test_results_go_with_the_adapter_they_were_measured_with(trained, tmp_path, capsys):
    sqa = results(trained, tmp_path / "sqa.json", AVG=89.41)
    assert main(["card", str(trained), "--results", sqa]) == 0
    (trained / ".eval_results" / "theirs.yaml").write_text("- dataset: {id: a/b, task_id: c}\n  value: 1\n")
    # Trained further, in the same folder and into another.
    model = AutoModel.from_pretrained(trained, mma={})
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).add_(0.1)
    for folder in (tmp_path / "further", trained):
        model.save_pretrained(folder)
        card = (folder / "README.md").read_text()
        assert not measured(folder) and "## Results" not in card and "89.41" not in card
        assert "Trainable parameters" in card
    assert main(["card", str(trained)]) == 0
    assert [path.name for path in (trained / ".eval_results").iterdir()] == ["theirs.yaml"]
    before = (trained / "README.md").read_text()
    capsys.readouterr()
    assert main(["card", str(trained), "--results", sqa]) == 2
    assert "measured with another adapter" in capsys.readouterr().err
    (tmp_path / "odd.json").write_text('{"scores": 1}')
    assert main(["card", str(trained), "--results", str(tmp_path / "odd.json")]) == 2
    assert "is no `results.json`" in capsys.readouterr().err
    assert main(["card", str(trained), "--results", str(tmp_path / "nothing.json")]) == 2
    assert (trained / "README.md").read_text() == before


def test_pushing_sends_card_and_results(trained, tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr("huggingface_hub.HfApi.upload_file", lambda self, **arguments: sent.append(arguments))
    sqa = results(trained, tmp_path / "sqa.json", AVG=89.41)
    assert main(["card", str(trained), "--results", sqa, "--push", "me/mine"]) == 0
    assert [upload["path_in_repo"] for upload in sent] == ["README.md", ".eval_results/scienceqa.yaml"]
    assert ModelCard.load(trained / "README.md").data.model_name == "me/mine"


def test_what_lavin_eval_writes_goes_into_the_card(lavin_folder, tmp_path):  # noqa: F811
    """From the question to the card, with the official counts of questions (of which the answers are made up)."""
    from test_evaluate_mme import PUBLISHED

    from lavin.recipes.evaluate import mme
    from lavin.recipes.evaluate.run import write_results

    folder = tmp_path / "model"
    AutoModel.from_pretrained(lavin_folder).save_pretrained(folder)
    questions = [
        {"id": f"{subtask}{i}{expected}", "subtask": subtask, "image": f"{i}", "expected": expected}
        for subtask, (_, n) in PUBLISHED.items()
        for i in range(n)
        for expected in ("yes", "no")
    ]
    run = {"model": {"name": "x", "adapter": adapter_digest(folder)}, "settings": {"mode": "generate"}}
    write_results(tmp_path / "mme", mme._results(questions, {q["id"]: "yes" for q in questions}, run), "")
    text = tmp_path / "a.txt"
    text.write_text("The answer is B. It is a small red ring on grey.")
    arguments = ["--model", str(folder), "--data", str(text), "--output", str(tmp_path / "text")]
    assert main(["eval", "text", *arguments]) == 0
    files = [str(tmp_path / name / "results.json") for name in ("mme", "text")]
    assert main(["card", str(folder), "--results", *files]) == 0
    found = measured(folder)
    assert found["MME", "perception"] == 500.0 and found["MME", "OCR"] == 50.0 and found["a.txt", "perplexity"] > 1
    entries = parse_eval_result_entries(yaml.safe_load((folder / ".eval_results" / "mme.yaml").read_text()))
    assert {(e.dataset_id, e.task_id): e.value for e in entries} == {
        ("lmms-lab/MME", "perception"): 500.0, ("lmms-lab/MME", "cognition"): 200.0,
    }  # fmt: skip
    assert not (folder / ".eval_results" / "text.yaml").exists()


def test_scored_predictions_go_in_only_where_they_say_whose_they_are(lavin_folder, data, tmp_path, capsys):  # noqa: F811
    folder, out = tmp_path / "model", tmp_path / "asked"
    AutoModel.from_pretrained(lavin_folder).save_pretrained(folder)
    root = ["eval", "scienceqa", "--root", str(data)]
    asked = [*root, "--model", str(lavin_folder), "--max-new-tokens", "2", "--batch-size", "30", "--output", str(out)]
    assert main(asked) == 0
    answers = {r["id"]: r["answer"] for r in map(json.loads, (out / "predictions.jsonl").open()) if "id" in r}
    (tmp_path / "foreign.json").write_text(json.dumps(answers))
    for file in ("foreign.json", "asked/predictions.jsonl"):
        assert main([*root, "--predictions", str(tmp_path / file), "--output", str(tmp_path / "scored")]) == 0
        capsys.readouterr()
        found = main(["card", str(folder), "--results", str(tmp_path / "scored" / "results.json")])
        if file == "foreign.json":
            assert found == 2 and "does not say which model was measured" in capsys.readouterr().err
            assert not measured(folder)
        else:
            assert found == 0 and len(measured(folder)) > 3
