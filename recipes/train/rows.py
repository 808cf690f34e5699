"""The rows of a recipe: are they of the form TRL needs, and how long are they?"""

import os

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Image, exceptions, load_dataset
from jinja2 import TemplateError
from tqdm import tqdm
from trl import DatasetMixtureConfig, apply_chat_template, get_dataset
from trl.data_utils import prepare_multimodal_messages


FORM = (
    "Needed are conversational rows: `prompt` and `completion` (lists of messages) or `messages`, and `images`, a "
    "list per row that is empty where there is none. `lavin data` writes them."
)
FILE_KINDS = ("parquet", "json", "csv", "arrow", "text")
SHOWN = 5  # rows named in a message
ROWS_PER_PROCESS = 2000


def load_rows(values: dict):
    """
    The data sets of a recipe, loaded as TRL loads them.

    Args:
        values (`dict`): Every option of TRL with its value.

    Returns:
        `dict[str, Dataset or IterableDataset]`: the split to train on and, where the run evaluates, the one for that.

    Raises:
        `ValueError`: if files are missing, empty or of another kind, or a split is not there.
    """
    if values["datasets"]:
        for number, source in enumerate(values["datasets"]):
            if source["path"] in FILE_KINDS and not (source["data_files"] or source["data_dir"]):
                raise ValueError(f"datasets[{number}] has no `data_files`.")  # `datasets` would read this very folder
        sources, rest = list(values["datasets"]), {name: values[name] for name in ("streaming", "test_split_size")}
        load, arguments = get_dataset, (DatasetMixtureConfig(datasets=sources, **rest),)
    elif values["dataset_name"]:
        load, arguments = load_dataset, (values["dataset_name"], values["dataset_config"])
    else:
        raise ValueError("The recipe names no data: add `datasets: [{path: parquet, data_files: train.parquet}]`.")
    try:
        streaming = {"streaming": values["dataset_streaming"]} if load is load_dataset else {}
        found = load(*arguments, **streaming)
    except (exceptions.DatasetsError, OSError, ValueError) as error:  # pyarrow's are ValueErrors without a file name
        named = [source["data_files"] or source["path"] for source in values["datasets"]] or [values["dataset_name"]]
        cause = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"The data ({', '.join(map(str, named))}) cannot be read: {cause}") from error
    wanted = ["train" if values["datasets"] else values["dataset_train_split"]]
    if values["eval_strategy"] != "no":
        wanted.append(values["dataset_test_split"])
    if missing := [split for split in wanted if split not in found]:
        raise ValueError(
            f"The data has no split {missing[0]!r}, only {', '.join(found)}."
            + (" To evaluate, set `test_split_size`." if missing[0] == values["dataset_test_split"] else "")
        )
    return {split: found[split] for split in wanted}


def check_columns(split: str, rows, values: dict) -> tuple[list[str], str | None]:
    """
    Returns:
        `tuple[list[str], str or None]`: the columns with messages, and the one with images.

    Raises:
        `ValueError`: if the columns, or the settings for them, are not what TRL needs for a LaVIN.
    """
    features = rows.features or {}
    names = list(features) or list(next(iter(rows), {}))
    held = f"The {split} rows have the columns {', '.join(names) or '(none)'}."
    columns = ["messages"] if "messages" in names else ["prompt", "completion"]
    if missing := [name for name in columns if name not in names]:
        raise ValueError(f"{held} `{missing[0]}` is missing. {FORM}")
    if "image" in names and "images" in names:
        raise ValueError(f"{held} TRL would take `image` and forget `images`: remove one of them.")
    for name in columns:
        if getattr(features.get(name), "dtype", None) in ("string", "large_string"):
            raise ValueError(
                f"`{name}` of the {split} rows is plain text. TRL puts no template, BOS, EOS or image slot around "
                f"plain text, so the model would learn another format than it is asked in. {FORM}"
            )
    image = next((name for name in ("images", "image") if name in names), None)
    if image == "images" and features.get(image) is not None:
        inner = getattr(features[image], "feature", None)
        # `null`: a file in which no row has an image.
        if not isinstance(inner, Image) and getattr(inner, "dtype", None) not in ("string", "null"):
            raise ValueError(
                "`images` must be a list of images per row, `[]` where there is none. Wrap single ones in a list, "
                "cast the column and write it again: `dataset.cast_column('images', List(Image())).to_parquet(...)`."
            )
    if image is None:
        return columns, None
    if columns == ["messages"] and not values["assistant_only_loss"]:
        raise ValueError(
            "`messages` rows need `assistant_only_loss: true`: without it TRL puts every token into the labels, the "
            "image tokens too, which are no words and have no logit."
        )
    if columns != ["messages"] and values["completion_only_loss"] is False:
        raise ValueError("`completion_only_loss: false` puts the image tokens into the labels: remove it.")
    return columns, image


def measure(split: str, rows, columns: list[str], image: str | None, processor, limit: int | None, processes=None):
    """
    Tokenises every row as TRL will. No image is opened.

    Args:
        split (`str`): Its name, for the progress bar.
        rows (`Dataset` or `IterableDataset`): What [`load_rows`] gave.
        columns, image: What [`check_columns`] gave.
        processor ([`LavinProcessor`]): That of the model.
        limit (`int`, *optional*): `max_length`: what lies beyond it is counted.
        processes (`int`, *optional*): By default one per 2,000 rows, at most one per core.

    Returns:
        `dict[str, np.ndarray]`: per row `images`, `prompt` and `completion` (tokens), `cut_answer` and `cut_image`
        (tokens beyond the limit), `problem` (empty where TRL can take the row).
    """
    arguments = {"columns": columns, "processor": processor, "limit": limit, "joined": image is None}
    if not isinstance(rows, Dataset):
        parts = []
        rows = rows.decode(False) if image else rows
        for batch in tqdm(rows.iter(500), desc=f"Checking {split} rows", unit="00 rows", unit_scale=5):
            count = [_count(value, image) for value in batch[image]] if image else [0] * len(batch[columns[0]])
            parts.append(_measure({name: batch[name] for name in columns}, counts=count, **arguments))
        return {key: np.concatenate([np.asarray(part[key]) for part in parts]) for key in (parts or [RESULT])[0]}
    if not len(rows):
        return {key: np.asarray(value) for key, value in RESULT.items()}
    counts = _count_images(rows, image)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = processes or max(1, min(cores, len(rows) // ROWS_PER_PROCESS))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes are forked
    measured = rows.select_columns(columns).map(
        lambda batch, indices: _measure(batch, counts=[counts[i] for i in indices], **arguments),
        with_indices=True,
        batched=True,
        batch_size=500,
        remove_columns=columns,
        num_proc=processes if processes > 1 else None,
        keep_in_memory=True,
        new_fingerprint=f"lavin-{os.getpid()}-{split}",  # not kept: nothing is hashed
        desc=f"Checking {split} rows",
    )
    return {key: np.asarray(measured[key][:]) for key in RESULT}


RESULT = {"images": [], "prompt": [], "completion": [], "cut_answer": [], "cut_image": [], "problem": []}


def _count(value, image: str) -> int:
    return -1 if value is None else len(value) if image == "images" else 1


def _count_images(rows: Dataset, image: str | None) -> list[int]:
    """Images of each row, -1 where the column has no value; the images themselves stay on disk."""
    if image is None:
        return [0] * len(rows)
    counts = []
    for batch in rows.select_columns([image]).with_format("arrow").iter(10_000):
        column = batch[image]
        count = pc.list_value_length(column) if image == "images" else pc.is_valid(column).cast("int64")
        counts += pc.fill_null(pc.if_else(pc.is_valid(column), count, -1), -1).to_pylist()
    return counts


def _measure(batch: dict, counts: list[int], columns, processor, limit, joined: bool) -> dict:
    result = {key: [0] * len(counts) for key in RESULT}
    result["images"], result["problem"] = [max(count, 0) for count in counts], [""] * len(counts)
    texts, kept = [], []
    for i, count in enumerate(counts):
        try:
            if count < 0:
                raise ValueError("no value in the image column: write `[]` where there is no image")
            texts += _render({name: batch[name][i] for name in columns}, count, processor)
            kept.append(i)
        except (ValueError, KeyError, TypeError, IndexError, TemplateError) as error:
            result["problem"][i] = str(error) or type(error).__name__
    token = processor.image_token
    texts = [text.replace(token, token * processor.num_image_tokens) for text in texts]
    if joined or columns == ["messages"]:  # TRL tokenises these rows in one piece
        texts = [piece for pair in zip(texts[::2], texts[1::2], strict=True) for piece in (pair[0], "".join(pair))]
    ids = processor.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    for i, prompt, rest in zip(kept, ids[::2], ids[1::2], strict=True):
        whole = rest if joined or columns == ["messages"] else prompt + rest
        result["prompt"][i], result["completion"][i] = len(prompt), len(whole) - len(prompt)
        if limit is not None and len(whole) > limit:
            result["cut_answer"][i] = min(len(whole) - limit, len(whole) - len(prompt))
            result["cut_image"][i] = whole[limit:].count(processor.image_token_id)
    return result


def _render(row: dict, images: int, processor) -> list[str]:
    """Prompt and completion of a row as text, by TRL's own functions; a talk is split before its last answer."""
    if "messages" in row:
        messages = prepare_multimodal_messages(row["messages"], images=["image"] * images)
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=0)
        if not last:
            raise ValueError("no assistant message to learn from")
        row = {"prompt": messages[:last], "completion": messages[last:]}
    else:
        row = {
            "prompt": prepare_multimodal_messages(row["prompt"], images=["image"] * images),
            "completion": prepare_multimodal_messages(row["completion"]),
        }
    rendered = apply_chat_template(row, processor)
    return [rendered["prompt"], rendered["completion"]]


def check_rows(split: str, measured: dict, limit: int | None, given: bool, context: int | None):
    """
    Args:
        split (`str`): Its name.
        measured (`dict`): What [`measure`] gave.
        limit (`int`, *optional*): `max_length`; `given` says whether the recipe names it.
        context (`int`, *optional*): The longest row that the language model can read.

    Raises:
        `ValueError`: if there are no rows, TRL cannot take a row, would cut an answer or an image, or the language
        model cannot read it.
    """
    if not len(measured["problem"]):
        raise ValueError(f"There are no {split} rows: the files are there, but empty.")
    bad = np.flatnonzero(measured["problem"] != "")
    if len(bad):
        shown = "\n".join(f"  row {i}: {' '.join(str(measured['problem'][i]).split())}" for i in bad[:SHOWN])
        more = f"\n  and {len(bad) - SHOWN:,} more" if len(bad) > SHOWN else ""
        raise ValueError(f"TRL cannot take {len(bad):,} of {len(measured['problem']):,} {split} rows:\n{shown}{more}")
    length = measured["prompt"] + measured["completion"]
    order = np.argsort(-length, kind="stable")[:SHOWN]
    if limit is not None and (over := int((length > limit).sum())):
        longest = ", ".join(f"row {i} ({length[i]:,} tokens)" for i in order if length[i] > limit)
        answers, pictures = measured["cut_answer"] > 0, measured["cut_image"] > 0
        gone = int((measured["cut_answer"] >= measured["completion"])[answers].sum())
        name = "`max_length`" if given else "`max_length`, TRL's default where a recipe has none"
        raise ValueError(
            f"{over:,} of {len(length):,} {split} rows are longer than {limit:,} ({name}). The longest: {longest}. "
            f"TRL would cut them on the right and lose {int(measured['cut_answer'].sum()):,} answer tokens of "
            f"{int(answers.sum()):,} rows (the whole answer in {gone:,}) and {int(measured['cut_image'].sum()):,} "
            f"image tokens of {int(pictures.sum()):,} rows. Set `max_length: null` (`--max_length null`), or at least "
            f"{int(length.max()):,}, or leave these rows out."
        )
    if context is not None and (over := int((length > context).sum())):
        longest = ", ".join(f"row {i} ({length[i]:,} tokens)" for i in order if length[i] > context)
        raise ValueError(
            f"{over:,} of {len(length):,} {split} rows are longer than the {context:,} tokens that the language model "
            f"can read (`max_position_embeddings`). The longest: {longest}. Shorten these rows or leave them out."
        )
