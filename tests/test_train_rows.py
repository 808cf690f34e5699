"""`lavin train` on rows: lengths as TRL counts them, rows and columns that it refuses."""

import re

import numpy as np
import pytest
import training
from datasets import Dataset, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from training import DEFAULTS

from lavin import LavinProcessor
from lavin.recipes.train.rows import check_columns, check_rows, load_rows, measure


light, rows = training.light, training.rows


def user(*content):
    return {
        "role": "user",
        "content": [{"type": "image"} if c is None else {"type": "text", "text": c} for c in content],
    }


def talk(text: str) -> dict:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def picture() -> Image.Image:
    return Image.new("RGB", (32, 32), "red")


def row(prompt, answer: str, images: int | None = 0) -> dict:
    return {"prompt": prompt, "completion": [talk(answer)], "images": None if images is None else [picture()] * images}


def dataset(*entries: dict) -> Dataset:
    return Dataset.from_list(list(entries)).cast_column("images", List(ImageFeature()))


def lengths(data, processor, limit=None, **values):
    columns, image = check_columns("train", data, {**DEFAULTS, **values})
    return measure("train", data, columns, image, processor, limit)


def test_lengths_are_those_of_trls_batches(light, rows):
    """Token by token: TRL's own collator on each row; strings as content, several images, talks; streamed, too."""
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    processor = LavinProcessor.from_pretrained(light)
    mixed = load_rows({**DEFAULTS, "datasets": [{"path": "parquet", "data_files": str(rows), **SOURCE}]})["train"]
    strings = dataset(
        {"prompt": [{"role": "user", "content": "What?"}], "completion": [{"role": "assistant", "content": "A cat."}],
         "images": [picture()] * 2},
        {"prompt": [{"role": "user", "content": "And now?"}], "completion": [{"role": "assistant", "content": "No."}],
         "images": []},
    )  # fmt: skip
    talks = [user(None, "What?"), talk("A cat."), user("Sure?"), talk("The answer is B.")]
    talks = dataset({"messages": talks, "images": [picture()]}, {"messages": talks[2:], "images": []})
    for data, values in [(mixed, {}), (strings, {}), (talks, {"assistant_only_loss": True})]:
        collator = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=not values, **values)
        found = lengths(data, processor, **values)
        streamed = lengths(data.to_iterable_dataset(), processor, **values)
        for i, entry in enumerate(data):
            batch = collator([entry])
            assert found["prompt"][i] + found["completion"][i] == batch["attention_mask"].sum()
            assert found["images"][i] == len(entry["images"])
            if not values:
                assert found["completion"][i] == (batch["labels"] != -100).sum()
        assert all((found[key] == streamed[key]).all() for key in found)


SOURCE = {"name": None, "data_dir": None, "split": "train", "columns": None}


def test_lengths_are_the_same_with_several_processes(light, rows):
    data = Dataset.from_parquet(str(rows))
    processor = LavinProcessor.from_pretrained(light)
    one, two = (measure("train", data, ["prompt", "completion"], "images", processor, 30, n) for n in (1, 2))
    assert all((one[key] == two[key]).all() for key in one)


def test_rows_that_would_be_cut_are_counted(light):
    """What is said to be lost is what TRL's collator drops."""
    from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

    processor = LavinProcessor.from_pretrained(light, image_order="interleaved")  # an image at the end may be cut
    data = dataset(
        row([user(None, "What?\nResponse:")], "No.", 1),
        row([user(None, None, "What is this?\nResponse:")], "The answer is B, the answer is B, the answer is B.", 2),
        row([user("What is this? " * 9, None)], "B", 1),
    )
    whole = lengths(data, processor)
    total = whole["prompt"] + whole["completion"]
    check_rows("train", whole, None, True, int(total.max()))
    limit = int(total[0])
    found = lengths(data, processor, limit=limit)
    cut = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True, max_length=limit)
    batches = [cut([entry]) for entry in data]
    left = np.array([int((batch["labels"] != -100).sum()) for batch in batches])
    pictures = np.array([int((batch["input_ids"] == processor.image_token_id).sum()) for batch in batches])
    assert (whole["completion"] - found["cut_answer"] == left).all() and found["cut_answer"][0] == 0
    assert (whole["images"] * processor.num_image_tokens - found["cut_image"] == pictures).all()
    assert found["cut_image"][2] > 0 and left[2] == 0
    lost = int(found["cut_answer"].sum())
    longest = int(total.argmax())
    message = (
        f"2 of 3 train rows are longer than {limit} .*The longest: row {longest} .{total[longest]} tokens.*lose "
        rf"{lost} answer tokens of 2 rows .the whole answer in \d+. and {found['cut_image'].sum()} image tokens of "
        rf"{(found['cut_image'] > 0).sum()} rows.*max_length: null.*at least {total.max()}"
    )
    with pytest.raises(ValueError, match=message):
        check_rows("train", found, limit, True, None)
    with pytest.raises(ValueError, match="TRL's default"):
        check_rows("train", found, limit, False, None)
    with pytest.raises(ValueError, match=rf"longer than the {limit} tokens .*max_position_embeddings"):
        check_rows("train", whole, None, True, limit)


def test_rows_that_trl_cannot_take_are_named(light):
    processor = LavinProcessor.from_pretrained(light)
    data = dataset(
        row([user(None, "What?")], "A", 1),
        row([user("What?")], "A", 1),
        row([user(None, "What?")], "A", 0),
        row([user("What?")], "A", None),
        row([], "A"),
    )
    with pytest.raises(ValueError) as error:
        check_rows("train", lengths(data, processor), None, True, None)
    text = str(error.value)
    assert "4 of 5 train rows" in text and "row 0" not in text
    for line in (
        r"row 1: .*provided \(1\).*\(0\)",
        r"row 2: .*provided \(0\).*\(1\)",
        r"row 3: .*write `\[\]`",
        "row 4:",
    ):
        assert re.search(line, text), (line, text)
    one = data.select([0, 3]).map(lambda r: {"image": (r["images"] or [None])[0]}, remove_columns="images")
    with pytest.raises(ValueError, match="1 of 2 train rows:\n  row 1: no value in the image column"):
        check_rows("train", lengths(one, processor), None, True, None)
    with pytest.raises(ValueError, match="no train rows"):
        check_rows("train", lengths(data.select([]), processor), None, True, None)


PAIR = {"prompt": [user("What?")], "completion": [talk("A")]}


@pytest.mark.parametrize(
    ("entry", "values", "match"),
    [
        ({"text": "What? A", "images": []}, {}, "`prompt` is missing"),
        ({"prompt": "What?", "completion": "A", "images": []}, {}, "`prompt` .* plain text"),
        ({"messages": [user("What?"), talk("A")], "images": []}, {}, "assistant_only_loss: true"),
        ({**PAIR, "images": []}, {"completion_only_loss": False}, "image tokens into the labels"),
        ({**PAIR, "images": "a.png"}, {}, "must be a list of images per row"),
        ({**PAIR, "images": [{"bytes": b"x", "path": None}]}, {}, "cast_column"),
        ({**PAIR, "images": [], "image": "a.png"}, {}, "`image` and forget `images`"),
    ],
)
def test_columns_that_trl_would_misread(entry, values, match):
    data = Dataset.from_list([entry])
    with pytest.raises(ValueError, match=match):
        check_columns("train", data, {**DEFAULTS, **values})


def test_data_files_that_are_not_there(tmp_path, rows):
    def refused(match, **source):
        with pytest.raises(ValueError, match=match):
            load_rows({**DEFAULTS, "datasets": [{**SOURCE, "path": "parquet", "data_files": None, **source}]})

    refused(r"datasets.0. has no `data_files`")
    (tmp_path / "other.parquet").write_bytes(b"")
    refused(
        r"trai\*.parquet. cannot be read: At least one valid data file", data_files=str(tmp_path / "trai*.parquet")
    )
    refused(
        "other.parquet.* cannot be read: Parquet file size is 0",
        data_files={"train": [str(tmp_path / "other.parquet")]},
    )
    (tmp_path / "other.parquet").write_bytes(rows.read_bytes()[:-100])
    refused("other.parquet. cannot be read: .*Parquet", data_files=str(tmp_path / "other.parquet"))
    with pytest.raises(ValueError, match="names no data"):
        load_rows(DEFAULTS)
    with pytest.raises(ValueError, match="no split 'test'"):
        source = {**SOURCE, "path": "parquet", "data_files": str(rows)}
        load_rows({**DEFAULTS, "datasets": [source], "eval_strategy": "steps"})


def test_a_column_of_paths_and_rows_without_images_are_fine(light):
    processor = LavinProcessor.from_pretrained(light)
    data = Dataset.from_list([{**PAIR, "images": []}] * 2)
    assert lengths(data.cast_column("images", List(Value("string"))), processor)["images"].tolist() == [0, 0]
    assert (
        lengths(data, processor)["completion"] == lengths(data.remove_columns("images"), processor)["completion"]
    ).all()
