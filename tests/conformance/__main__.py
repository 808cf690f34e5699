"""
Runs the common test suites of the installed transformers and PEFT on LaVIN, and on LLaVA and LoRA beside it.

    python tests/conformance [suite ...] [-k EXPRESSION] [--output DIR]

Writes report.json and table.md, and prints the table. Exit code 1 where LaVIN fails or skips what the model beside it
does not, unless reasons.py says why; 2 where the suites cannot be had.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path

from generation import GenerationTesterMixin
from reasons import REASONS
from sources import ROOT, SUITES, IndexUnreachable, fetch


HERE = Path(__file__).parent
FILES = {
    "configuration": ("suite_model.py", "TestConfiguration", "LLaVA"),
    "model": ("suite_model.py", "TestModel", "LLaVA"),
    "generation": ("suite_model.py", "TestModel", "LLaVA"),
    "training": ("suite_model.py", "TestTraining", "LLaVA"),
    "processor": ("suite_processor.py", "TestProcessor", "LLaVA"),
    "peft": ("suite_peft.py", "TestPeft", "LoRA on LLaVA"),
}
SOURCES = {
    "configuration": "`ConfigTester`",
    "model": "`ModelTesterMixin`",
    "generation": "ours, by the names of `GenerationTesterMixin`",
    "training": "`TrainingTesterMixin`",
    "processor": "`ProcessorTesterMixin`",
    "peft": "`PeftCommonTester`",
}


def suite_of(class_name: str, test: str) -> str:
    if hasattr(GenerationTesterMixin, test):
        return "generation"
    return next(name for name, (_, prefix, _) in FILES.items() if class_name.startswith(prefix))


def read_results(path: Path) -> dict[tuple[str, str], dict[str, dict]]:
    """`{(suite, test): {"lavin" | "reference": {"outcome", "reason"}}}` of a JUnit file."""
    results = {}
    for case in ElementTree.parse(path).iter("testcase"):
        class_name, name = case.get("classname").rpartition(".")[2], case.get("name")
        if not class_name.startswith("Test"):
            raise RuntimeError(f"{case.get('classname')}: {ElementTree.tostring(case, 'unicode')[:4000]}")
        if inner := re.fullmatch(r"test\[(.*?)-?\]", name):  # one parametrised test for all checks of PEFT
            name = inner[1]
        outcome, reason = "passed", ""
        for child in case:
            if child.tag in ("failure", "error"):
                outcome, reason = "failed", child.get("message") or (child.text or "").strip()
            elif child.tag == "skipped" and outcome == "passed":
                outcome, reason = "skipped", child.get("message")
        side = "lavin" if class_name.endswith("Lavin") else "reference"
        known = results.setdefault((suite_of(class_name, name), name), {}).get(side)
        if known is None or known["outcome"] != "failed":  # a failed subtest may have an entry of its own
            results[suite_of(class_name, name), name][side] = {"outcome": outcome, "reason": " ".join(reason.split())}
    return results


def run(suites: list[str], expression: str, output: Path) -> dict:
    """Runs the suites in pytest processes of their own and puts their results side by side."""
    results, output = {}, output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    environment = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **os.environ, "HF_HUB_OFFLINE": "1"}
    for file in dict.fromkeys(FILES[suite][0] for suite in suites):
        classes = sorted({FILES[suite][1] for suite in suites if FILES[suite][0] == file})
        wanted = " or ".join(classes)
        report = output / f"{Path(file).stem}.xml"
        report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", HERE / file, "-q", "-m", "", "--tb=short", "-p", "no:cacheprovider"]
        command += ["-W", "ignore::DeprecationWarning", "-W", "default::FutureWarning"]  # the originals' own
        command += ["-k", f"({wanted}) and ({expression})" if expression else wanted, f"--junitxml={report}"]
        log = output / f"{Path(file).stem}.log"
        print(f"{file}: {wanted} (log: {log})", file=sys.stderr, flush=True)
        with log.open("w") as stream:
            code = subprocess.run(list(map(str, command)), env=environment, stdout=stream, stderr=stream).returncode
        if code not in (0, 1, 5):  # passed, some failed, none chosen
            raise RuntimeError(f"pytest ended with {code}: " + log.read_text()[-4000:])
        if code != 5:
            results.update(read_results(report))
    return {key: sides for key, sides in sorted(results.items()) if key[0] in suites}


def judge(results: dict) -> list[dict]:
    """One row for each test: both outcomes, the stated reason if there is one, and what is wrong, if anything."""
    rows = []
    for (suite, test), sides in results.items():
        missing = {"outcome": "not run", "reason": ""}
        lavin, reference = sides.get("lavin", missing), sides.get("reference", missing)
        stated = next((reason for key, reason in REASONS.items() if fnmatch(f"{suite}::{test}", key)), None)
        problem = None
        if lavin["outcome"] == "passed" and stated:
            problem = "passes: its entry in reasons.py has to go"
        elif lavin["outcome"] == "failed" and reference["outcome"] != "failed" and not stated:
            problem = "fails, and what runs beside it does not"
        elif lavin["outcome"] in ("skipped", "not run") and reference["outcome"] == "passed" and not stated:
            problem = f"{lavin['outcome']}, and what runs beside it passes"
        row = {"suite": suite, "test": test, "lavin": lavin, "reference": reference}
        rows.append({**row, "stated": stated, "problem": problem})
    return rows


def table(rows: list[dict]) -> str:
    """The counts of each suite, then every test that did not pass for LaVIN; Markdown."""
    packages = ", ".join(f"{name} {version(name)}" for name in SUITES)
    lines = [f"The common test suites of {packages}; a stated reason stands in `reasons.py`.", ""]
    lines += ["| suite | LaVIN passed | failed | skipped | stated reason | beside it | passed | failed | skipped |"]
    lines += ["|---|--:|--:|--:|--:|---|--:|--:|--:|"]
    for suite in [suite for suite in FILES if any(row["suite"] == suite for row in rows)]:
        own = [row for row in rows if row["suite"] == suite]

        def count(side, outcome, rows=own):
            return sum(
                row[side]["outcome"] == outcome and not (side == "lavin" and row["stated"] and outcome != "passed")
                for row in rows
            )

        stated = sum(bool(row["stated"]) and row["lavin"]["outcome"] != "passed" for row in own)
        numbers = [count("lavin", outcome) for outcome in ("passed", "failed", "skipped")] + [stated]
        beside = [count("reference", outcome) for outcome in ("passed", "failed", "skipped")]
        cells = [f"{suite}: {SOURCES[suite]}", *numbers, FILES[suite][2], *beside]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    shown = [row for row in rows if row["lavin"]["outcome"] != "passed" or row["problem"]]
    for title, chosen in (
        ("To mend", [row for row in shown if row["problem"]]),
        ("Does not apply, for a stated reason", [row for row in shown if row["stated"] and not row["problem"]]),
        ("As what runs beside it", [row for row in shown if not row["stated"] and not row["problem"]]),
    ):
        if chosen:
            lines += ["", f"{title}:", "", "| suite | tests | LaVIN | beside it |", "|---|---|---|---|"]
        groups = {}  # tests of one reason are one line
        for row in chosen:
            reason = row["stated"] or row["lavin"]["reason"] or row["problem"]
            reason = re.sub(r"<class '[^']*'>|Lavin(Model|ForConditionalGeneration)", "it", reason)
            key = (row["suite"], row["lavin"]["outcome"], reason[:300], row["reference"]["outcome"])
            name = re.sub(r"(_[0-9]+_.*|_[0-9]+|-[A-Za-z0-9.]+)$", "", row["test"])  # without parameters
            groups.setdefault(key, {}).setdefault(name, []).append(row)
        for (suite, outcome, reason, other), tests in groups.items():
            names = ", ".join(f"{name} ({len(own)})" if len(own) > 1 else name for name, own in tests.items())
            cells = [suite, names, f"{outcome}: {reason}", other]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tests/conformance", description=__doc__.split("\n\n")[0].strip())
    parser.add_argument("suites", nargs="*", metavar="suite", help=f"of {', '.join(FILES)}; all by default")
    parser.add_argument("-k", dest="expression", default="", help="only tests whose names match, as in pytest")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs" / "conformance", help="default: %(default)s")
    options = parser.parse_args(arguments)
    if unknown := set(options.suites) - set(FILES):
        parser.error(f"no suite {', '.join(sorted(unknown))}; there are {', '.join(FILES)}")
    try:
        fetch()
    except IndexUnreachable as error:
        print(error, file=sys.stderr)
        return 2
    rows = judge(run(options.suites or list(FILES), options.expression, options.output))
    text = table(rows)
    report = {"versions": {name: version(name) for name in (*SUITES, "torch")}, "tests": rows}
    (options.output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (options.output / "table.md").write_text(text)
    print(text)
    problems = [row for row in rows if row["problem"]]
    for row in problems:
        print(f"{row['suite']}::{row['test']}: {row['problem']}", file=sys.stderr)
    if not rows:
        print("No test was chosen.", file=sys.stderr)
    return 1 if problems or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
