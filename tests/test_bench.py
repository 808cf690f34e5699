"""The benchmarks run and report what they should; no test asserts a time."""

import json
import math

import pytest
import torch

from lavin.recipes.bench.__main__ import main
from lavin.recipes.bench.models import QUICK, adapted_lavin, embed, frozen_lavin, language_model, make_batch
from lavin.recipes.bench.step_time import labelled_loss


STEP_RATIOS = {"mma/base", "mma/lora", "mma/base_vision", "mma_labelled/base", "mma_labelled/lora", "lora/base"}


@pytest.mark.parametrize(
    ("only", "name", "cases", "ratios"),
    [
        ("step", "step_time", {"training step"}, STEP_RATIOS),
        ("decode", "decode_time", {"batch 1", "batch 16"}, {"mma/base", "folded/base", "merged/base"}),
    ],
)
def test_quick(tmp_path, capsys, only, name, cases, ratios):
    threads = torch.get_num_threads()
    main(["--quick", "--only", only, "--output", str(tmp_path)])
    assert torch.get_num_threads() == threads
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}.json"]
    report = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    assert {"title", "name", "machine", "rounds", "size", "notes", "results"} <= set(report)
    assert {"cpu", "cores", "threads", "torch", "transformers", "peft"} <= set(report["machine"])
    assert report["rounds"] == 2 and set(report["results"]) == cases
    for row in report["results"].values():
        assert set(row["ratios"]) == ratios
        numbers = [*row["seconds"].values(), *(ratio["median"] for ratio in row["ratios"].values())]
        assert all(math.isfinite(number) and number > 0 for number in numbers)
    printed = capsys.readouterr().out
    assert all(ratio in printed for ratio in ratios) and report["machine"]["cpu"] in printed


def test_rounds_are_checked(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--quick", "--rounds", "0", "--output", str(tmp_path)])
    assert "--rounds" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_rivals_compute_the_same():
    """The base, fed embeddings, is the frozen LaVIN; MMA only differs by its adapter."""
    frozen = frozen_lavin(QUICK).eval()
    plain, adapted = language_model(frozen).eval(), adapted_lavin(QUICK).eval()
    batch = make_batch(QUICK, frozen.config, seed=0)
    with torch.no_grad():
        expected = frozen(**batch).loss
        rival = plain(
            inputs_embeds=embed(frozen, batch), attention_mask=batch["attention_mask"], labels=batch["labels"]
        ).loss
        with adapted.disable_adapter():
            disabled = adapted(**batch).loss
        trained = adapted(**batch).loss
        labelled = labelled_loss(adapted, batch)
    torch.testing.assert_close(rival, expected)
    torch.testing.assert_close(disabled, expected)
    assert not torch.equal(trained, expected)
    torch.testing.assert_close(labelled, trained)
