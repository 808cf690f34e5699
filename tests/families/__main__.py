"""
`make families`: every language model and every vision tower of the installed transformers in a LaVIN, as a table.

Each family becomes a tiny random checkpoint on disk and goes through every column. `docs/families.md` is written anew
when all families ran; the log, with the numbers behind each verdict, goes to `outputs/families/log.txt`.
"""

import argparse
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from families.shrink import text_families, tower_families  # noqa: E402
from families.table import page  # noqa: E402
from families.walk import Walk  # noqa: E402


ROOT = Path(__file__).resolve().parents[2]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python tests/families", description=__doc__.strip().splitlines()[0])
    parser.add_argument("families", nargs="*", metavar="family", help="of these only; the page is not written then")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "families.md", help="default: %(default)s")
    options = parser.parse_args(argv)
    log = ROOT / "outputs" / "families" / "log.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    known = {"text": text_families(), "tower": tower_families()}
    rows = {kind: [] for kind in known}
    with log.open("w", encoding="utf-8") as file, Walk() as walk:
        for kind, names in known.items():
            chosen = [name for name in names if not options.families or name in options.families]
            for i, name in enumerate(chosen, 1):
                row, seconds = walk.row(kind, name)
                rows[kind].append(row)
                print(f"{kind} {i}/{len(chosen)} {name}: {row.said()} ({seconds:.1f} s)", file=sys.stderr, flush=True)
                print(f"{kind} {name}", *row.lines(), sep="\n    ", file=file, flush=True)
    text = page(rows["text"], rows["tower"])
    if not options.families:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text, encoding="utf-8")
    print(text)
    wrong = [row for each in rows.values() for row in each if row.wrong]
    for row in wrong:
        print(f"{row.family}: " + "; ".join(f"{column}: {why}" for column, why in row.wrong.items()), file=sys.stderr)
    print(f"The log: {log}", file=sys.stderr)
    return int(bool(wrong) or not any(rows.values()))


if __name__ == "__main__":
    sys.exit(main())
