"""`make conformance`: the common suites of transformers and PEFT, in part, and what is made of their results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


CONFORMANCE = Path(__file__).parent / "conformance"


def command(*arguments, **environment):
    return subprocess.run(
        [sys.executable, CONFORMANCE, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_a_part_of_the_suites(tmp_path):
    """The originals, from the package index: all of `ConfigTester`, and a test or two of others."""
    chosen = "Configuration or test_determinism or test_greedy_generate or test_model_attr or test_merge_layers_nan"
    suites = ("configuration", "model", "generation", "peft")
    result = command(*suites, "-k", chosen, "--output", tmp_path)
    if result.returncode == 2 and "package index" in result.stderr:
        pytest.skip(f"the package index cannot be reached: {result.stderr.splitlines()[-2]}")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    rows = json.loads((tmp_path / "report.json").read_text())["tests"]
    assert {row["suite"] for row in rows} == set(suites) and not any(row["problem"] for row in rows)
    outcomes = {row["test"]: (row["lavin"]["outcome"], row["reference"]["outcome"]) for row in rows}
    assert outcomes.pop("test_merge_layers_nan") == ("failed", "passed")  # for a stated reason
    assert len(outcomes) > 12 and set(outcomes.values()) == {("passed", "passed")}
    assert (tmp_path / "table.md").read_text() in result.stdout
    assert "One merge" not in result.stdout and "one merge cannot serve both" in result.stdout


@pytest.mark.slow
def test_an_index_out_of_reach_is_said(tmp_path):
    """Nothing in the cache and no index: what was wanted, pip's own words, and exit code 2."""
    result = command(LAVIN_CONFORMANCE_CACHE=str(tmp_path), PIP_NO_INDEX="1")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "package index" in result.stderr and "No matching distribution" in result.stderr


JUDGE = """
import json, runpy, sys
sys.path.insert(0, sys.argv[1])
module = runpy.run_path(sys.argv[1] + "/__main__.py", run_name="conformance")
results = {tuple(key): sides for key, sides in json.load(sys.stdin)}
rows = module["judge"](results)
print(json.dumps([rows, module["table"](rows)]))
"""


def test_what_is_reported(tmp_path):
    """A failure or a skip that what runs beside does not have, a stale reason; and what is no problem."""

    def sides(lavin, reference):
        return {
            "lavin": {"outcome": lavin, "reason": f"own {lavin}"},
            "reference": {"outcome": reference, "reason": ""},
        }

    cases = {
        ("model", "test_a"): (sides("passed", "failed"), None),
        ("model", "test_b"): (sides("failed", "failed"), None),
        ("model", "test_c"): (sides("skipped", "skipped"), None),
        ("model", "test_d"): (sides("failed", "passed"), "fails"),
        ("model", "test_e"): (sides("failed", "skipped"), "fails"),
        ("model", "test_f"): (sides("skipped", "passed"), "skipped"),
        ("peft", "test_merge_layers"): (sides("failed", "passed"), None),
        ("peft", "test_safe_merge"): (sides("passed", "passed"), "has to go"),
    }
    given = json.dumps([[key, case] for key, (case, _) in cases.items()])
    run = subprocess.run([sys.executable, "-c", JUDGE, CONFORMANCE], input=given, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows, table = json.loads(run.stdout)
    for row, (key, (_, expected)) in zip(rows, cases.items(), strict=True):
        assert (row["suite"], row["test"]) == key
        assert (row["problem"] or "").count(expected or "") > 0 if expected else row["problem"] is None, row
    assert "| 1 | 3 | 2 | 0 | LLaVA | 2 | 2 | 2 |" in table
    assert "| 1 | 0 | 0 | 1 | LoRA on LLaVA | 2 | 0 | 0 |" in table
    assert table.index("To mend") < table.index("test_d") < table.index("Does not apply") < table.index("test_merge")
