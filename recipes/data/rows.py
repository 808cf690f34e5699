"""Rows for `trl sft`: what they look like, how an image is checked, how they get into Parquet."""

import warnings
from collections.abc import Iterable
from pathlib import Path

from lavin import images_lavin


ROW_GROUP = 2**24  # bytes of rows that are held before they are written
SHARD = 500 * 2**20  # bytes of rows in one file, about
OURS = b"lavin_data"  # in a Parquet file's footer: `lavin data` may replace it


class BadRow(ValueError):
    """
    An entry that cannot become a row.

    Args:
        kind (`str`): What is wrong, in words that are the same for all such entries: they are counted by it.
        detail (`str`, *optional*): What is wrong with this one.
    """

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(f"{kind}: {detail}" if detail else kind)
        self.kind, self.detail = kind, detail


def text_part(text: str) -> dict:
    """A text in a message's content; raises [`BadRow`] where Parquet could not hold it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can hold half of a character
        raise BadRow("not a text", str(error)) from error
    return {"type": "text", "text": text}


def image_part() -> dict:
    """The place of an image in a message's content; TRL fills them in order from the row's `images`."""
    return {"type": "image", "text": None}


def message(role: str, *parts: dict) -> dict:
    """One message of a conversation."""
    return {"role": role, "content": list(parts)}


def read_image(path: str | Path) -> dict:
    """
    Reads an image file as it is, after checking that all of it can be decoded to RGB.

    Returns:
        `dict`: as `datasets.Image` stores it: `bytes`, and `path`, which is `None`: the row can be moved.

    Raises:
        [`BadRow`]: if there is no such file, or it cannot be decoded.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise BadRow("image missing", f"{path} ({error.strerror})") from error
    return {"bytes": check_image(data, str(path)), "path": None}


def check_image(data: bytes, name: str) -> bytes:
    """Returns the bytes of an image file, which can be decoded to RGB to the last row; raises [`BadRow`] otherwise."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about palettes and metadata
            images_lavin.read_image(data)
    except Exception as error:  # Pillow's decoders raise all sorts
        raise BadRow("image unreadable", f"{name} ({str(error) or type(error).__name__})") from error
    return data


def row_features(names: Iterable[str]):
    """
    The `datasets.Features` of rows with these columns.

    Raises:
        `ValueError`: if a column is none of those that rows may have.
    """
    from datasets import Features, Image, List, Value

    chat = List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})})
    known = {
        "prompt": chat, "completion": chat, "images": List(Image()), "id": Value("string"),
        "answer": Value("int64"), "choices": List(Value("string")), "category": Value("string"),
    }  # fmt: skip
    if strange := [name for name in names if name not in known]:
        raise ValueError(f"Rows may have {', '.join(known)}; these have {', '.join(strange)} as well.")
    return Features({name: known[name] for name in names})


class ShardWriter:
    """
    Writes rows to Parquet files of bounded size in bounded memory, the images' bytes inside.

    A row group stores equal images once: the rows of one conversation, which stand together, share theirs.

    Args:
        name (`Callable[[int], Path]`): The path of the n-th file.
        shard_bytes (`int`, *optional*, defaults to 500 MiB): After so many bytes a new file is begun.
    """

    def __init__(self, name, shard_bytes: int = SHARD):
        self.name, self.shard_bytes = name, shard_bytes
        self.paths, self.rows, self.images = [], 0, 0
        self.writer, self.features, self.held, self.held_bytes, self.shard_size = None, None, [], 0, 0

    def add(self, row: dict):
        if self.features is None:
            self.features = row_features(row)
        self.held.append(row)
        self.rows += 1
        self.images += len(row["images"])
        texts = [
            part["text"] or "" for key in ("prompt", "completion") for turn in row[key] for part in turn["content"]
        ]
        self.held_bytes += sum(len(image["bytes"]) for image in row["images"]) + sum(map(len, texts))
        if self.held_bytes >= ROW_GROUP or len(self.held) >= 1000:
            self.flush()

    def flush(self):
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not self.held:
            return
        if self.writer is None:
            self.paths.append(self.name(len(self.paths)))
            schema = self.features.arrow_schema
            schema = schema.with_metadata({**schema.metadata, OURS: b"1"})
            # Beyond the limit equal images would be stored again and again.
            self.writer = pq.ParquetWriter(self.paths[-1], schema, dictionary_pagesize_limit=2**30)
        self.writer.write_table(pa.Table.from_pylist(self.held, schema=self.writer.schema))
        self.shard_size += self.held_bytes
        self.held, self.held_bytes = [], 0
        if self.shard_size >= self.shard_bytes:
            self.close_file()

    def close_file(self):
        if self.writer is not None:
            self.writer.close()
        self.writer, self.shard_size = None, 0

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind, *_):
        try:
            if kind is None:
                self.flush()
        finally:
            self.close_file()


def write_parquet(rows: Iterable[dict], path: str | Path) -> int:
    """
    Writes rows to one Parquet file with the images' bytes inside, so that it can be moved anywhere.

    Args:
        rows (`Iterable[dict]`): `prompt` and `completion` (messages), `images` (`{"bytes", "path"}`), and any of `id`,
            `answer`, `choices`, `category`. They are taken one by one.
        path (`str` or `Path`): The file to write; it appears when it is complete.

    Returns:
        `int`: the number of rows.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with ShardWriter(lambda n: partial, shard_bytes=2**62) as writer:
            for row in rows:
                writer.add(row)
        if not writer.rows:
            raise ValueError(f"There are no rows to write to {path}.")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return writer.rows
