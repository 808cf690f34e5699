"""`lavin train-segments`: a plan, then `lavin train` for each segment."""

import json
import os
import re
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from lavin.card_lavin import END

from ..report import duration, readable
from ..train.checkpoints import list_checkpoints, read_state, step_of, weights_problem
from ..train.checks import check_output, check_room
from ..train.record import compare_record
from ..train.settings import Settings, read_several
from ..train.train import check_run, locked, train
from .plan import Cost, cost, measure_speed, plan
from .recipe import OURS, Segment, read_recipe


RECORD = "segments.json"  # in the folder of the whole: what each finished segment was and gave
SECTION = re.compile(r"\n*<!-- lavin:segments -->.*?<!-- /lavin:segments -->", flags=re.S)


def train_segments(recipe: str | os.PathLike, overrides: list[str] | tuple[str, ...] = (), dry_run=False) -> int:
    """
    Checks all segments of a recipe, prints a plan, and trains one after the other. Called again after a crash, it goes
    on in the segment and at the checkpoint where it was.

    Args:
        recipe (`str` or `os.PathLike`): See [`read_recipe`](recipe.py).
        overrides (`list[str]`): Further options of `trl sft` and `accelerate launch`, for all segments.
        dry_run (`bool`, *optional*, defaults to `False`): Stop after the plan; nothing is written.

    Returns:
        `int`: 0, or the exit code of the segment that failed or was stopped.

    Raises:
        `OSError`, `ValueError`: if something would go wrong in any segment; nothing has been started then.
    """
    called = time.monotonic()
    output, segments = read_recipe(recipe)
    overrides = list(overrides)
    print("Checking the recipe, the model and the rows of all segments ...", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        settings = read_several([segment.write(Path(folder)) for segment in segments], overrides)
    for segment, own in zip(segments, settings, strict=True):
        for key in (*OURS, "model_init_kwargs"):
            if own[key] != segment.values.get(key) and own[key]:
                raise ValueError(f"`--{key}` is for one run; for segments it follows from {recipe}.")
    finished = finished_segments(output, segments)
    costs = [cost(*checked) for checked in check_segments(segments, settings, finished)]
    speeds = [record["speed"] for record in finished.values() if record.get("speed")]
    speed = speeds[-1] if speeds else measure_speed(settings[0])
    start = time.monotonic() - called  # a segment imports and checks as much before its first step
    print(plan(segments, costs, finished, speed, start, bool(speeds)), flush=True)
    if dry_run:
        return 0
    with locked(output, settings[0].machine_rank):
        for i, segment in enumerate(segments):
            if segment.title in finished:
                continue
            _announce(segments, costs, finished, i, speed, start)
            begun, before = time.monotonic(), _step(segment)
            file = segment.write(output)
            own = replace(settings[i], arguments=["--config", str(file), *overrides])
            if code := train(file, overrides, own):
                print(f"\nSegment {segment.number} of {len(segments)} ({segment.name}) is not finished.", flush=True)
                return code
            seconds = time.monotonic() - begun
            done = 1 - before / costs[i].steps  # the share of it that this launch did
            speed = costs[i].flops * done / max(seconds - start, seconds / 10) if done > 0 else speed
            record = _record(segment, settings[i], costs[i], seconds, speed)
            finished[segment.title] = record
            if settings[0].machine_rank == 0:
                write_section(segment.folder, finished, segments[: i + 1])
                _write_records(output, finished)  # last: from here on the segment is not done again
    print(f"\nAll {len(segments)} segments are finished. The result is {segments[-1].folder}.", flush=True)
    return 0


def finished_segments(output: Path, segments: list[Segment]) -> dict[str, dict]:
    """
    The records of the segments that are finished, by title, in order.

    Raises:
        `ValueError`: if one started from elsewhere than the recipe says, or its folder has gone.
    """
    file = output / RECORD
    if not file.is_file():
        return {}
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error} Name another `output_dir`.") from error
    found = {}
    for segment in segments:
        record = stored.get(segment.title)
        if record is None:
            break  # those after it start from it
        if record["start"] != segment.start:
            raise ValueError(
                f"Segment {segment.name} is finished, and started from {record['start']}, not from {segment.start}: "
                "restore `init_from`, or name another `output_dir`."
            )
        if problem := weights_problem(segment.folder):
            raise ValueError(
                f"Segment {segment.name} is finished, but in {segment.folder} {problem}. Put it back, or remove its "
                f"entry {segment.title!r} from {file} to train it again."
            )
        found[segment.title] = record
    return found


def check_finished(segment: Segment, record: dict):
    """
    Raises:
        `ValueError`: if a finished segment was trained with other settings, parts or rows than the recipe's.
    """
    held = list_checkpoints(segment.folder)
    if held and (longer := compare_record(held[0], record)):
        raise ValueError(f"It is finished, and {longer} Restore the steps, or name another `output_dir`.")


def check_segments(segments: list[Segment], settings: list[Settings], finished: dict) -> list[tuple]:
    """
    Checks every segment as `lavin train` will. Where a segment starts from one that is not there yet, its model is the
    folder that the first of them starts from.

    Returns:
        `list[tuple[Settings, Checked]]`: of each segment, with that model, and what was found.

    Raises:
        `OSError`, `ValueError`: if something would go wrong; the message says in which segment.
    """
    checked, needed = [], 0
    for segment, own in zip(segments, settings, strict=True):
        first = segment
        while first.after is not None and first.after.title not in finished:
            first = first.after
        stand_in = replace(own, values={**own.values, "model_name_or_path": first.start})
        try:
            found = check_run(stand_in)
            if segment.title in finished:
                check_finished(segment, found.record)
            else:
                held = len(list_checkpoints(segment.folder))
                needed += check_output(stand_in, found.size, found.steps, held)
        except (OSError, ValueError) as error:
            kind = ValueError if isinstance(error, ValueError) else OSError
            raise kind(f"Segment {segment.number} ({segment.name}): {error}") from error
        checked.append((stand_in, found))
    check_room(segments[0].folder, needed, f"all segments together write {readable(needed)}")
    return checked


def _step(segment: Segment) -> int:
    held = list_checkpoints(segment.folder)
    return step_of(held[0]) if held else 0


def _announce(segments: list[Segment], costs: list[Cost], finished: dict, i: int, speed: float, start: float):
    """The place of a segment among all."""
    steps, done = sum(one.steps for one in costs), sum(one.steps for one in costs[:i])
    bar = "".join("#" if segment.title in finished else "." for segment in segments)
    left = duration(sum(one.flops / speed + start for one in costs[i:]))
    word = "about" if finished else "at least"
    print(
        f"\n[{bar}] Segment {i + 1} of {len(segments)}: {segments[i].name}; {done:,} of {steps:,} steps done, {word} "
        f"{left} left",
        flush=True,
    )


def _record(segment: Segment, settings: Settings, one: Cost, seconds: float, speed: float) -> dict:
    last = list_checkpoints(segment.folder)
    history = read_state(last[0])["log_history"] if last else []
    losses = [entry["loss"] for entry in history if "loss" in entry]
    return {
        "start": segment.start,
        "parts": one.parts,
        "data": one.data,
        "steps": one.steps,
        "learning rate": settings["learning_rate"],
        "loss": [losses[0], losses[-1]] if losses else None,
        "seconds": seconds,
        "speed": speed,
    }


def _write_records(output: Path, records: dict):
    draft = output / f".{RECORD}"
    draft.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
    draft.replace(output / RECORD)


def write_section(folder: Path, records: dict, segments: list[Segment]):
    """Puts what the segments trained, on what, into the card of a folder, below its facts."""
    card = folder / "README.md"
    text = SECTION.sub("", card.read_text(encoding="utf-8")) if card.is_file() else ""
    if END not in text:  # somebody else's
        return
    rows = [["segment", "trained values", "data", "steps", "learning rate", "loss, first to last"]]
    rows.append(["---"] * len(rows[0]))
    for segment in segments:
        record = records[segment.title]
        loss = " to ".join(f"{value:.3g}" for value in record["loss"] or [])
        about = [segment.name, record["parts"], record["data"], f"{record['steps']:,}"]
        rows.append([*about, f"{record['learning rate']:.3g}", loss])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    title = "## Training\n\nIn this order, each segment from what the one before wrote (`lavin train-segments`):"
    section = f"<!-- lavin:segments -->\n{title}\n\n{table}\n<!-- /lavin:segments -->"
    card.write_text(text.replace(END, f"{END}\n\n{section}", 1), encoding="utf-8")
