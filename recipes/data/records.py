"""The entries of JSON files as tables on disk, any of which can be read alone: memory does not grow with them."""

import codecs
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np


def json_rows(path: str | Path, at: str | None = None, key: str | None = None) -> Iterator[dict]:
    """
    Goes through a JSON list or object, one entry at a time.

    Args:
        path (`str` or `Path`): The file.
        at (`str`, *optional*): Which object is read: `""` is the top, another is a key of the top. By default the top
            is a list. `"name[]"` is a list under a key of the top.
        key (`str`, *optional*): The field of a list's entries that is their key.

    Yields:
        `dict`: `key` (in a list that of the field, if any) and `entry`, its JSON, which says what the file says,
        letters and numbers.

    Raises:
        `ValueError`: if the file is broken, or holds no such list or object.
    """
    import ijson

    is_list, at = at is None or at.endswith("[]"), (at or "").removesuffix("[]")
    reader = ijson.get_backend("python")  # the faster ones write "?" for half of a character
    with open(path, "rb") as file:
        start = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
        try:
            file.seek(start)
            opening = next((event for place, event, _ in reader.parse(file) if place == at), None)
            if opening == ("start_array" if is_list else "start_map"):
                file.seek(start)
                entries = (
                    ((_key(entry, key), entry) for entry in reader.items(file, f"{at}.item" if at else "item"))
                    if is_list
                    else reader.kvitems(file, at)
                )
                for name, entry in entries:
                    # numbers with a point come as decimals, which `float` reads like `json`
                    yield {"key": name, "entry": json.dumps(entry, default=float).encode()}
                return
        except (ijson.JSONError, ValueError) as error:
            raise ValueError(
                f"{path} is no JSON file that can be read: {error} (stopped at byte {file.tell():,})."
            ) from error
    raise ValueError(f"{path} holds no {'list' if is_list else 'object'}{f' called {at!r}' if at else ''}.")


def _key(entry, field: str | None) -> str | None:
    value = entry.get(field) if field and isinstance(entry, dict) else None
    return None if value is None else str(value)


def line_rows(path: str | Path) -> Iterator[dict]:
    """Goes through a file of JSON Lines as [`json_rows`] goes through a list; empty lines are left out."""
    with open(path, "rb") as file:
        yield from ({"key": None, "entry": line} for line in file if line.strip())


def keep(rows: Callable[..., Iterator[dict]], folder: Path, **arguments):
    """
    Writes entries to a table on disk.

    Args:
        rows (`Callable`): [`json_rows`] or [`line_rows`], which is called with `arguments`.
        folder (`Path`): Where the table goes. A fresh one for each run: what lies there already is not read again.

    Returns:
        `datasets.Dataset`: with the columns `key` and `entry`, read from the disk row by row.
    """
    from datasets import Dataset, Features, NamedSplit, Value
    from datasets.exceptions import DatasetGenerationError

    features = Features({"key": Value("string"), "entry": Value("binary")})
    if next(rows(**arguments), None) is None:  # from_generator refuses to make an empty table
        return Dataset.from_dict({name: [] for name in features}, features)
    try:
        return Dataset.from_generator(
            rows, features, cache_dir=str(folder), gen_kwargs=arguments, split=NamedSplit("entries")
        )
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from None  # what is wrong with the file, or with the disk


def find(entries, keys: np.ndarray) -> np.ndarray:
    """For each key the number of its row in a table of [`keep`]; -1 where there is none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    # from the end: of two entries with the same key the last counts, as in `json`
    known = entries.data["key"].combine_chunks()[::-1]
    at = pc.index_in(pa.array(keys, pa.string()), value_set=known)
    return pc.fill_null(pc.subtract(len(known) - 1, at), -1).to_numpy()
