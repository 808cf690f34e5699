"""What a cell of the table says, and how it is found."""

import contextlib
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import lavin


RIGHT, AS_BASE, REFUSED, NOT_APPLICABLE, WRONG = "right", "as the base", "refused", "n/a", "wrong"
TOLERANCE = 2e-4
CODE = Path(lavin.__file__).resolve().parent
HUB_FILES = {path.name for path in CODE.glob("*.py")}


@dataclass
class Row:
    """A family's cells: of each column a verdict and, where it is not simply right, why."""

    family: str
    cells: dict[str, tuple[str, str]] = field(default_factory=dict)
    numbers: dict[str, str] = field(default_factory=dict)

    def set(self, columns, verdict: str, why: str = ""):
        for column in [columns] if isinstance(columns, str) else columns:
            self.cells.setdefault(column, (verdict, why))

    @property
    def whole(self) -> bool:
        """Whether the family as a whole is refused or not applicable."""
        return {verdict for verdict, _ in self.cells.values()} in ({REFUSED}, {NOT_APPLICABLE})

    def said(self) -> str:
        """The row in a line."""
        kinds = [verdict for verdict, _ in self.cells.values()]
        counted = {verdict: kinds.count(verdict) for verdict in dict.fromkeys(kinds)}
        return ", ".join(verdict if self.whole else f"{count} {verdict}" for verdict, count in counted.items())

    def lines(self) -> list[str]:
        """What is not simply right, each reason once."""
        groups = {}
        for column, cell in self.cells.items():
            if cell[0] != RIGHT:
                groups.setdefault((*cell, self.numbers.get(column, "")), []).append(column)
        return [f"{', '.join(columns)}: {' | '.join(filter(None, cell))}" for cell, columns in groups.items()] or [
            RIGHT
        ]

    def clean(self, *folders: str):
        """Leaves out of what was said where it was said."""
        for column, (verdict, why) in self.cells.items():
            for folder in folders:
                why = why.replace(f"{folder}/", "")
            self.cells[column] = verdict, why

    @property
    def wrong(self) -> dict[str, str]:
        return {column: why for column, (verdict, why) in self.cells.items() if verdict == WRONG}


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__


def is_ours(error: BaseException) -> bool:
    """Whether a sentence of LaVIN's own was raised, rather than something that broke on the way."""
    frames = traceback.extract_tb(error.__traceback__)
    return (
        isinstance(error, ValueError | OSError | NotImplementedError) and Path(frames[-1].filename).name in HUB_FILES
    )


def place(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {one_line(error)} ({Path(frame.filename).name}:{frame.lineno})"


def refusal(error: BaseException) -> tuple[str, str]:
    """The verdict on what made no model: a sentence of LaVIN's own refuses it, anything else is wrong."""
    return (REFUSED, one_line(error)) if is_ours(error) else (WRONG, place(error))


def attempt(function):
    """A function's result, or what it raised."""
    try:
        return function(), None
    except Exception as error:
        return None, error


def judge(row: Row, column: str, ours, theirs=None, refuses=None):
    """
    Fills a cell by what `ours()` gives: the difference from what it should be. Where it is too large, or it raises,
    `theirs()`, the same of the base alone, says whether that is LaVIN's doing. Where `refuses()`, a call of the base,
    raises, LaVIN has to raise as well.
    """
    if column in row.cells and row.cells[column][0] not in (RIGHT, AS_BASE):
        return
    value, error = attempt(ours)
    if error is None and value <= TOLERANCE:
        if refuses is not None and (base_error := attempt(refuses)[1]) is not None:
            row.cells[column] = (WRONG, f"answers, where the base refuses: {one_line(base_error)}")
        row.cells.setdefault(column, (RIGHT, ""))
        return
    if error is not None and is_ours(error):
        row.cells[column] = (REFUSED, one_line(error))
        return
    base, base_error = attempt(theirs) if theirs is not None else (0.0, None)
    if base_error is not None and (error is not None or value > TOLERANCE):
        verdict = REFUSED if error is not None else WRONG
        said = f"as the base: {one_line(base_error)}"
        row.cells[column] = (verdict, said if error is not None else f"off by {value:.1e}, where the base refuses")
    elif error is not None:
        row.cells[column] = (WRONG, place(error))
    elif base > TOLERANCE:
        row.cells[column] = (AS_BASE, "")
        row.numbers[column] = f"off by {value:.1e}, the base by {base:.1e}"
    else:
        row.cells[column] = (WRONG, f"off by {value:.1e}, the base by {base:.1e}")


@contextlib.contextmanager
def nothing_said():
    """No warnings and no progress bars of transformers: a table of hundreds of models drowns in them."""
    import warnings

    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.set_verbosity(level)
