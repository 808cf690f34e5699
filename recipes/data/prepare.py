"""From a source of entries to Parquet files: shuffled, by several processes, in bounded memory, all or nothing."""

import multiprocessing
import shutil
import signal
import sys
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .rows import OURS, BadRow, ShardWriter


BATCH = 32  # entries that a process works on at a time
SHOWN = 20  # skipped entries that are printed; all of them are in the file


@dataclass
class Prepared:
    """
    What [`prepare`] has written.

    Args:
        files (`list[Path]`): The Parquet files, in order.
        pattern (`str`): Matches them all, whatever their number: for `data_files` in a recipe.
        entries, rows, images (`int`): How many entries there were, how many rows and images in them were written.
        skipped (`Counter`): How many entries were left out, by what is wrong with them.
        first (`list[str]`): The first of them, with what is wrong.
        skipped_file (`Path`, *optional*): Lists them; `None` where there are none.
    """

    files: list[Path]
    pattern: str
    entries: int
    rows: int
    images: int
    skipped: Counter = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)
    skipped_file: Path | None = None


def prepare(
    source, output: str | Path, split: str, seed: int = 0, num_proc: int = 1, skip_bad: bool = False
) -> Prepared:
    """
    Writes a source's rows to `<split>-00000-of-0000N.parquet`, the images' bytes inside.

    The order of the rows depends on the seed alone, not on the number of processes. Files of an earlier run for the
    same split are replaced when the new ones are complete; until then they stay as they are.

    Args:
        source ([`ScienceQA`] or [`Instructions`]):
            What is read: `index(scratch)` finds its entries, `len(source)` is their number, `name(i)` is an entry's
            id, `place(i)` says where it is, and `rows(i)` gives its rows or raises [`BadRow`].
        output (`str` or `Path`): The folder; made if it is not there.
        split (`str`): How the files' names begin.
        seed (`int`, *optional*, defaults to 0): Seed of the order of the entries; an entry's rows stay together.
        num_proc (`int`, *optional*, defaults to 1): Processes that read entries and check images.
        skip_bad (`bool`, *optional*, defaults to `False`): Leaves bad entries out and lists them, instead of stopping.

    Returns:
        [`Prepared`]

    Raises:
        `ValueError`: if an entry is bad, or no entry is left, or the folder has files of that name from elsewhere.
    """
    if num_proc < 1:
        raise ValueError(f"--num-proc must be at least 1, got {num_proc}.")
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    earlier = earlier_files(output, split)
    listing = output / f"{split}-skipped.tsv"
    scratch = output / f".{split}.partial"
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    scratch.mkdir()
    skipped, first = Counter(), []
    try:
        source.index(scratch)
        if not len(source):
            raise ValueError(f"There are no entries to prepare in split {split!r}.")
        order = np.random.default_rng(seed).permutation(len(source))
        bar = tqdm(total=len(source), desc=f"Preparing {split}", unit=" entries")
        with (
            bar,
            closing(worked(source, order, num_proc)) as results,
            ShardWriter(lambda n: scratch / str(n)) as writer,
            open(scratch / "skipped", "w", encoding="utf-8") as log,
        ):
            log.write("id\tplace\treason\tdetail\n")
            for good, bad in results:
                for name, place, kind, detail in bad:
                    said = f"{name} ({place}): {kind}" + (f": {detail}" if detail else "")
                    if not skip_bad:
                        raise ValueError(
                            f"entry {said}. Nothing was written. Repair the entry, or leave such entries out with "
                            "--skip-bad, which lists them."
                        )
                    log.write("\t".join(" ".join(part.split()) for part in (name, place, kind, detail)) + "\n")
                    skipped[kind] += 1
                    if len(first) < SHOWN:
                        first.append(said)
                for rows in good:
                    for row in rows:
                        writer.add(row)
                bar.update(len(good) + len(bad))
        if not writer.rows:
            raise ValueError(f"None of the {len(source):,} entries can be used: {by_kind(skipped)}.")
        # From here on it takes a moment. The old files go first: a pattern must not match old and new ones together.
        for path in [*earlier, *([listing] if listing.exists() else [])]:
            path.unlink()
        files = [output / f"{split}-{n:05}-of-{len(writer.paths):05}.parquet" for n in range(len(writer.paths))]
        for made, path in zip(writer.paths, files, strict=True):
            made.replace(path)
        if skipped:
            (scratch / "skipped").replace(listing)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    pattern = (output / f"{split}-*.parquet").as_posix()
    listed = listing if skipped else None
    return Prepared(files, pattern, len(source), writer.rows, writer.images, skipped, first, listed)


def by_kind(skipped: Counter) -> str:
    """`"3 image missing, 1 no choices"`."""
    return ", ".join(f"{count:,} {kind}" for kind, count in skipped.most_common())


def earlier_files(output: Path, split: str) -> list[Path]:
    """Files of an earlier run for this split; raises `ValueError` if one of that name is from elsewhere."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = sorted(output.glob(f"{split}-*.parquet"))
    for path in found:
        try:
            ours = OURS in (pq.read_schema(path).metadata or {})
        except pa.ArrowException:
            ours = False
        if not ours:
            raise ValueError(f"{path} was not written by `lavin data`, and {split}-*.parquet would match it too. "
                             "Choose another --output, or move it away.")  # fmt: skip
    return found


def worked(source, order: np.ndarray, num_proc: int) -> Iterator[tuple[list, list]]:
    """Yields what [`work`] returns for one batch of entries after another, in order; holds no more than a few."""
    batches = (order[start : start + BATCH].tolist() for start in range(0, len(order), BATCH))
    if num_proc == 1:
        yield from (work(source, batch) for batch in batches)
        return
    # Where it is safe, a fork: a fresh interpreter would import torch and the rest first.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    with ProcessPoolExecutor(num_proc, context, initializer=start_worker, initargs=(source,)) as pool:
        waiting = deque(pool.submit(work_here, batch) for batch in islice(batches, 2 * num_proc))
        try:
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(work_here, batch) for batch in islice(batches, 1))
        except BrokenProcessPool as error:
            raise OSError(
                "A worker process has died, perhaps for want of memory: try a smaller --num-proc."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def work(source, batch: list[int]) -> tuple[list, list]:
    """
    Makes the rows of some entries.

    Returns:
        `tuple`: the rows of each good entry; id, place, kind of fault and detail of each bad one.
    """
    good, bad = [], []
    for index in batch:
        try:
            good.append(source.rows(index))
        except BadRow as error:
            bad.append((source.name(index), source.place(index), error.kind, error.detail))
    return good, bad


_source = None  # of a worker process


def start_worker(source):
    global _source
    _source = source
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops its workers


def work_here(batch: list[int]) -> tuple[list, list]:
    return work(_source, batch)
