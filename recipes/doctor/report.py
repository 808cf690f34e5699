"""The lines of `lavin doctor`. No error of one check stops the others."""

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass


OK, WARN, FAIL, SKIP = "OK", "WARN", "FAIL", "skip"
COLOURS = {OK: 32, WARN: 33, FAIL: 31, SKIP: 90}
WIDTH = 17


@dataclass
class Line:
    """
    Args:
        status (`str`): `"OK"`, `"WARN"`, `"FAIL"` or `"skip"`.
        name (`str`): What was looked at.
        found (`str`): What was found there.
        do (`str`, *optional*): What to do about it; every `"FAIL"` and `"WARN"` says so.
    """

    status: str
    name: str
    found: str
    do: str = ""


class Finding(Exception):
    """Ends a check that is not fine: with a status, what was found and, where it is not the check's own, a way out."""

    def __init__(self, status: str, found: str, do: str = ""):
        super().__init__(found)
        self.status, self.found, self.do = status, found, do


def examine(checks: list[tuple[str, Callable, str]]) -> int:
    """
    Runs checks one after the other and prints each line as soon as it is known.

    Args:
        checks (`list`): Of each the name, what is called (see [`lines_of`]), and the way out after an error.

    Returns:
        `int`: 0 where no line is a `"FAIL"`, else 1.
    """
    start, counts = time.time(), dict.fromkeys(COLOURS, 0)
    with _quiet():
        for check in checks:
            for line in lines_of(*check):
                counts[line.status] += 1
                print(_text(line), flush=True)
    seconds = f"{time.time() - start:.1f} s"
    if counts[FAIL]:
        print(f"{counts[FAIL]} failed, {counts[OK]} fine ({seconds}). Each FAIL says what to do.")
        return 1
    warned = f", {counts[WARN]} with a limit" if counts[WARN] else ""
    print(f"All fine: {counts[OK]} checked{warned}, {counts[SKIP]} skipped ({seconds}).")
    return 0


def lines_of(name: str, run: Callable, do: str) -> Iterator[Line]:
    """The lines of a check: those it returns, one for the words it returns, and one for what it raises."""
    try:
        found = run()
        yield from [Line(OK, name, found)] if isinstance(found, str) else found
    except Finding as found:
        yield Line(found.status, name, found.found, found.do or (do if found.status in (FAIL, WARN) else ""))
    except (Exception, SystemExit) as error:  # argparse and broken packages exit
        yield Line(FAIL, name, said(error), do)


def said(error: BaseException, limit: int = 500) -> str:
    """An error on one line."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= limit else text[:limit] + " ..."


def _text(line: Line) -> str:
    status = f"{line.status:<4}"
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb":
        status = f"\033[{COLOURS[line.status]}m{status}\033[0m"
    do = f"\n      {'':<{WIDTH}} Do: {line.do}" if line.do else ""
    return f"{status}  {line.name:<{WIDTH}} {line.found}{do}"


@contextlib.contextmanager
def _quiet():
    """Nothing but the lines: what libraries log and warn of while they are tried out is not what was asked."""
    from transformers.utils import logging as transformers_logging

    disabled, bars = logging.root.manager.disable, transformers_logging.is_progress_bar_enabled()
    logging.disable(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        if bars:
            transformers_logging.enable_progress_bar()
