"""A file of answers that a killed run goes on with: a line that says whose they are, then one line per answer."""

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image
from tqdm import tqdm
from transformers.utils import cached_file

from lavin import LavinConfig
from lavin.card_lavin import ADAPTER_FILE, adapter_digest
from lavin.files_lavin import BASE_WEIGHTS, find_file

from .answers import render


def model_identity(name: str | os.PathLike) -> dict:
    """
    Which model this is, whatever its folder is called: the adapter's digest, the base it names, and of base weights in
    the folder itself the names and sizes, or the Hub's commit.

    Returns:
        `dict`: `adapter`, `base`, `weights`, `commit`; what there is not is `None`.
    """
    name = os.fspath(name)
    config = LavinConfig.get_config_dict(name)[0]
    base = {kind: config.get(f"{kind}_checkpoint") for kind in ("text", "vision", "base")}
    if os.path.isdir(name):
        folder, commit = Path(name), None
        files = sorted(file for file in folder.glob("model*.safetensors*"))
        weights = {file.name: _sample_digest(file) for file in files} or None
    else:
        found = find_file(name, ADAPTER_FILE, {})
        config_file = Path(cached_file(name, "config.json"))
        folder = Path(found).parents[1] if found else config_file.parent
        full = find_file(name, BASE_WEIGHTS[1:], {}) is not None
        commit, weights = (None if found and not full else config_file.parent.name), None
    return {"adapter": adapter_digest(folder), "base": base, "weights": weights, "commit": commit}


def _sample_digest(file: Path) -> str:
    """Digest of a file's size and 64 pieces of it: base weights have gigabytes, and other weights differ all over."""
    size, piece = file.stat().st_size, 1 << 16
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        for i in range(64):
            stream.seek(max(0, (size - piece) * i // 63))
            digest.update(stream.read(piece))
    return digest.hexdigest()


def questions_digest(processor, questions: list[dict]) -> str:
    """
    Digest of everything the model will read: texts as the chat template renders them, images as they are stored.

    Raises:
        `FileNotFoundError`: if images are missing.
        `ValueError`: if there is no question, two have one id, or an image is none.
    """
    if not questions:
        raise ValueError("There are no questions to ask: this split is empty.")
    ids = [question["id"] for question in questions]
    if len(set(ids)) < len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        raise ValueError(f"Two questions have the same id, {twice!r}: each needs its own.")
    missing = [
        (question["id"], image)
        for question in questions
        for image in question["images"]
        if isinstance(image, (str, os.PathLike)) and not os.path.isfile(image)
    ]
    if missing:
        raise FileNotFoundError(
            f"Missing images: {len(missing)}, the first is {missing[0][1]} of question {missing[0][0]}. Put them "
            "there; they are usually a download of their own."
        )
    digest = hashlib.sha256()
    for question in questions:
        text = render(processor, question["prompt"], len(question["images"]))
        images = [_image_bytes(image, question["id"]) for image in question["images"]]
        parts = [str(question["id"]).encode(), text.encode(), *images]
        digest.update(b"".join(hashlib.sha256(part).digest() for part in parts))
    return digest.hexdigest()


def _image_bytes(image, name: str) -> bytes:
    if isinstance(image, Image.Image):
        return repr((image.mode, image.size)).encode() + image.tobytes()
    data = image if isinstance(image, bytes) else Path(image).read_bytes()
    try:
        Image.open(io.BytesIO(data)).close()
    except Exception as error:  # before anything is asked: repaired, it would be another set of questions
        where = "" if isinstance(image, bytes) else f", {image},"
        raise ValueError(f"The image of question {name}{where} cannot be read: repair it or leave it out.") from error
    return data


def read_answers(path: str | os.PathLike) -> tuple[dict | None, dict[str, dict], int]:
    """
    Reads a file of answers. A last line that a killed run left half-written is not counted.

    Returns:
        `tuple(dict, dict, int)`: the header (`None` for an empty file), the records by id, and the number of bytes
        that are whole.

    Raises:
        `ValueError`: if it is another kind of file, or a line in the middle is broken.
    """
    header, records, whole = None, {}, 0
    lines = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1]):  # what follows the last line break is empty or half a line
        try:
            record = json.loads(line)
            if number == 0:
                header = record["answers_of"]
            else:
                records[str(record["id"])] = record
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number + 1}, is not what `lavin eval` writes: repair it, or remove the file to ask "
                "everything again."
            ) from error
        whole += len(line) + 1
    return header, records, whole


def _differences(old: dict, new: dict, name: str = "") -> list[str]:
    found = []
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{name}{key}.")
        elif a != b:
            short = [f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else value for value in (a, b)]
            found.append(f"{name}{key}: {short[0]} there, {short[1]} now")
    return found


def collect_answers(
    path: str | os.PathLike,
    header: dict,
    questions: list[dict],
    ask: Callable[[list[dict]], Iterator[tuple[list[int], list[dict]]]],
    progress: str,
) -> tuple[dict[str, dict], int]:
    """
    Asks what the file does not hold yet, and appends the answers as they come.

    Args:
        path (`str` or `os.PathLike`): The file, new or of a run that was killed.
        header (`dict`): Whose answers these are: model, settings, digest of the questions.
        questions (`list[dict]`): Each with an `id`.
        ask (`Callable`): Takes the questions left, yields their places and records (without `id`), batch by batch. It
            is not called when nothing is left.
        progress (`str`): Name of the progress bar.

    Returns:
        `tuple(dict, int)`: every question's record by id, in the questions' order, and how many were asked now.

    Raises:
        `ValueError`: if the file holds answers of another model, other settings or other questions; or if the GPU's
            memory is too small.
    """
    path, records, whole = Path(path), {}, 0
    if path.is_file():
        found, records, whole = read_answers(path)
        if found != header and not records:
            whole = 0  # of a run that answered nothing
        elif found != header:
            raise ValueError(
                f"{path} holds answers of another run ({'; '.join(_differences(found, header))}). Name another "
                "--output, or remove that file to ask everything again."
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    left = [question for question in questions if str(question["id"]) not in records]
    with path.open("r+b" if path.is_file() else "w+b") as file:
        file.truncate(whole)
        file.seek(whole)

        def write(record: dict):
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")

        if whole == 0:
            write({"answers_of": header})
        file.flush()
        with tqdm(total=len(questions), initial=len(records), desc=progress, unit="question") as bar:
            try:
                for rows, new in ask(left) if left else ():
                    for row, record in zip(rows, new, strict=True):
                        record = {"id": str(left[row]["id"]), **record}
                        records[record["id"]] = record
                        write(record)
                    file.flush()
                    bar.update(len(rows))
            except ValueError as error:
                if not records:
                    raise
                raise ValueError(
                    f"{error} The {len(records)} answers so far are kept: start again to go on."
                ) from error
    return {str(question["id"]): records[str(question["id"])] for question in questions}, len(left)
