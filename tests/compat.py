"""
The test suite on the oldest and on the newest transformers, TRL, PEFT and huggingface_hub: `make compat`.

The oldest are the lower limits in `pyproject.toml`, for the Python that runs this; the newest are what the package
index gives within its limits, torch among them. Everything else comes from `constraints.txt`. Each gets an environment
of its own, in which the tests run; the table at the end is the one in docs/benchmarks.md.
"""

import argparse
import json
import subprocess
import sys
import venv
from pathlib import Path
from xml.etree import ElementTree

from packaging.requirements import Requirement


try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PACKAGES = ("transformers", "trl", "peft", "huggingface_hub")
COLUMNS = ("passed", "failed", "skipped")


def declared(extra: str = "train") -> dict[str, Requirement]:
    """What `pyproject.toml` says of the packages, for this Python."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = map(Requirement, [*project["dependencies"], *project["optional-dependencies"][extra]])
    return {r.name: r for r in lines if r.name in PACKAGES and (r.marker is None or r.marker.evaluate())}


def floor(requirement: Requirement) -> str:
    (version,) = (limit.version for limit in requirement.specifier if limit.operator == ">=")
    return version


def pins(which: str) -> list[str]:
    """Lines of a constraints file: those of `constraints.txt` for everything else, and the oldest where asked."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    # transformers says which tokenizers it takes.
    free = {*PACKAGES, "tokenizers"} | ({"torch"} if which == "newest" else set())
    lines = [line for line in lines if Requirement(line).name not in free]
    if which == "oldest":
        lines += [f"{name}=={floor(requirement)}" for name, requirement in declared().items()]
    return lines


def make_environment(which: str, folder: Path) -> Path:
    """An environment with the `dev` extra at those versions; one that is there already is brought up to date."""
    python, constraints = folder / which / "bin" / "python", folder / f"{which}.txt"
    constraints.write_text("\n".join(pins(which)) + "\n", encoding="utf-8")
    if not python.exists():
        venv.create(folder / which, with_pip=True)
    asked = ["-e", f"{ROOT}[dev]", "torch", *PACKAGES]
    install = [python, "-m", "pip", "install", "--upgrade", "-c", constraints, *asked]
    subprocess.run([*map(str, install)], check=True)
    return python


def versions(python: Path) -> dict[str, str]:
    """What is in an environment."""
    listed = subprocess.run([python, "-m", "pip", "list", "--format", "json"], check=True, capture_output=True)
    found = {package["name"].replace("-", "_").lower(): package["version"] for package in json.loads(listed.stdout)}
    number = subprocess.run([python, "-c", "import platform; print(platform.python_version())"], capture_output=True)
    return {"python": number.stdout.decode().strip(), **{name: found[name] for name in ("torch", *PACKAGES)}}


def count(report: Path) -> tuple[dict[str, int], list[str]]:
    """Of a JUnit report: how many tests passed, failed and were skipped, and which failed."""
    numbers, failed = dict.fromkeys(COLUMNS, 0), []
    for case in ElementTree.parse(report).iter("testcase"):
        outcomes = {child.tag for child in case}
        if outcomes & {"failure", "error"}:
            numbers["failed"] += 1
            failed.append(f"{case.get('classname')}::{case.get('name')}")
        else:
            numbers["skipped" if "skipped" in outcomes else "passed"] += 1
    return numbers, failed


def run(which: str, folder: Path, arguments: list[str]) -> tuple[dict, list[str]]:
    """One environment's row of the table, and the tests that failed in it."""
    python, report = make_environment(which, folder), folder / f"{which}.xml"
    report.unlink(missing_ok=True)
    print(f"\n{which}: {', '.join(' '.join(pair) for pair in versions(python).items())}", flush=True)
    done = subprocess.run([python, "-m", "pytest", "--junitxml", report, *arguments], cwd=ROOT)
    numbers, failed = count(report) if report.is_file() else (dict.fromkeys(COLUMNS, 0), ["no test ran"])
    if not failed and not numbers["passed"]:
        failed = ["no test ran"]
    elif not failed and done.returncode:
        failed = [f"pytest ended with exit code {done.returncode}"]
    return {"": which, **versions(python), **numbers}, failed


def table(rows: list[dict]) -> str:
    lines = [rows[0], dict.fromkeys(rows[0], "---"), *rows]
    lines[0] = {name: name for name in rows[0]}
    return "\n".join("| " + " | ".join(str(line[name]) for name in rows[0]) + " |" for line in lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--only", choices=("oldest", "newest"), help="one of the two")
    parser.add_argument("--all", action="store_true", help="the slow tests too")
    options, arguments = parser.parse_known_args(argv)  # the rest is pytest's
    folder = ROOT / "outputs" / "compat"
    folder.mkdir(parents=True, exist_ok=True)
    # What is deprecated is an error for the versions of `constraints.txt`, not for older and newer ones.
    arguments = ["-W", "default::FutureWarning", "-W", "default::DeprecationWarning", *arguments]
    arguments = [*(["-m", ""] if options.all else []), *arguments]
    results = [run(which, folder, arguments) for which in ("oldest", "newest") if options.only in (None, which)]
    print("\n" + table([row for row, _ in results]))
    for row, failed in results:
        print(*(f"failed, {row['']}: {name}" for name in failed), sep="\n", end="\n" if failed else "")
    return int(any(failed for _, failed in results))


if __name__ == "__main__":
    sys.exit(main())
