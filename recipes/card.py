"""Puts our model card back where a trainer wrote its own."""

import json
import os
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, HfApi, eval_result_entries_to_yaml
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from lavin import LavinConfig, MMAConfig
from lavin.card_lavin import BEGIN, END, RESULTS, adapter_digest, split_card, write_card
from lavin.files_lavin import ADAPTER_CONFIG, ADAPTER_NAME, replace_text

from .init import meta_model


# The form of results that the Hub shows beside a data set (https://huggingface.co/docs/hub/eval-results). A file's
# first line says what was measured.
EVAL_RESULTS, WRITTEN_BY = ".eval_results", "# Written by `lavin card`; measured adapter: "


def card_folder(
    folder: str | os.PathLike,
    push: str | None = None,
    results: list[str] | None = None,
    token: str | None = None,
) -> Path:
    r"""
    Writes the card of a LaVIN folder from what is in it, over a trainer's card. What a user wrote around our facts
    stays, and so do measured results, unless the adapter has changed since. No weights are loaded.

    Args:
        folder (`str` or `os.PathLike`): A LaVIN folder, such as the output of `trl sft`.
        push (`str`, *optional*): Hub name of a repository: its `README.md` and the results are replaced, nothing else.
        results (`list[str]`, *optional*): Files `results.json` of `lavin eval`. They go into the card (`model-index`
            and a table), beside those of other tasks, and into `.eval_results/` where the benchmark is a data set of
            the Hub. Writing them again changes nothing.
        token (`str`, *optional*): For the Hub; the stored one by default.

    Returns:
        `Path`: the card.

    Raises:
        `OSError`: if the folder cannot be written or the Hub refuses.
        `ValueError`: if it is no LaVIN folder, its `README.md` is somebody else's, or results were measured with
            another adapter or do not say with which.
    """
    card = Path(folder, "README.md")
    if not Path(folder, "config.json").is_file():
        raise ValueError(
            f"{folder} is no LaVIN folder: it has no config.json. Name the output of `trl sft` or `lavin`."
        )
    config, unused = LavinConfig.get_config_dict(folder)
    if config.get("model_type") != LavinConfig.model_type:
        raise ValueError(f"{folder} is no LaVIN folder: its config.json is of type {config.get('model_type')!r}.")
    measured = [_read_results(path, folder) for path in results or []]
    if not os.access(card if card.exists() else folder, os.W_OK):
        raise ValueError(f"{card} cannot be written: check its permissions.")
    has_adapter = Path(folder, ADAPTER_NAME, ADAPTER_CONFIG).is_file()
    adapter = MMAConfig.from_pretrained(folder, subfolder=ADAPTER_NAME) if has_adapter else None
    model = meta_model(LavinConfig.from_pretrained(folder), adapter=adapter)
    model._hf_peft_config_loaded = has_adapter
    write_card(model, folder)
    if BEGIN not in card.read_text():
        raise ValueError(
            f"{card} was written by somebody else and is left alone: move it away, or put the two lines {BEGIN} and "
            f"{BEGIN.replace('lavin', '/lavin')} where the facts shall go."
        )
    for file in _our_results(folder):
        if not file.read_text(encoding="utf-8").startswith(f"{WRITTEN_BY}{adapter_digest(folder)}\n"):
            file.unlink()  # of the adapter before it was trained further
    for result in measured:
        add_results(folder, _model_index(result), name=push or Path(folder).resolve().name)
        _write_eval_results(folder, result)
    if push is not None:
        for file in (card, *_our_results(folder)):
            HfApi(token=token).upload_file(
                path_or_fileobj=file, path_in_repo=file.relative_to(folder).as_posix(), repo_id=push,
                commit_message="Write the card of a LaVIN",
            )  # fmt: skip
    return card


def _read_results(path: str, folder) -> dict:
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
        model, _, _ = results["model"], results["dataset"]["name"], results["scores"]
        name, adapter = (model.get("name"), model["adapter"]) if model else (None, None)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no `results.json` of `lavin eval`.") from error
    if not model:  # a file of predictions was scored that does not say whose they are
        raise ValueError(
            f"{path} does not say which model was measured: evaluate {folder} itself, or score a `predictions.jsonl` "
            "of `lavin eval`, which does."
        )
    if adapter != adapter_digest(folder):
        raise ValueError(
            f"{path} was measured with another adapter{f' (of {name})' if name else ''} than that of {folder}: "
            "evaluate this folder, or name the one that was measured."
        )
    return results


def _model_index(results: dict) -> list[EvalResult]:
    dataset, settings = results["dataset"], results.get("settings") or {}
    types = results.get("metric_types", {})
    return [
        EvalResult(
            task_type="image-text-to-text" if dataset.get("images", True) else "text-generation",
            # Another word than "custom" would read like a data set of the Hub.
            dataset_type=dataset["hub"] or "custom", dataset_name=dataset["name"],
            dataset_config=None if dataset["hub"] else dataset["name"], dataset_split=dataset.get("split"),
            dataset_args=settings, metric_type=types.get(name, "accuracy"), metric_name=name, metric_value=value,
        )
        for name, value in results["scores"].items()
        if isinstance(value, (int, float))
    ]  # fmt: skip


def _write_eval_results(folder, results: dict):
    dataset = results["dataset"]
    if not dataset["hub"] or not results["benchmark"]:
        return
    settings = ", ".join(f"{key} {value}" for key, value in (results.get("settings") or {}).items())
    entries = [
        EvalResultEntry(dataset_id=dataset["hub"], task_id=task, value=value, date=results["date"], notes=settings)
        for task, value in results["benchmark"].items()
    ]
    file = Path(folder, EVAL_RESULTS, f"{results['task']}.yaml")
    file.parent.mkdir(exist_ok=True)
    text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
    file.write_text(f"{WRITTEN_BY}{adapter_digest(folder)}\n{text}", encoding="utf-8")


def _our_results(folder) -> list[Path]:
    files = sorted(Path(folder, EVAL_RESULTS).glob("*.yaml"))
    return [file for file in files if file.read_text(encoding="utf-8").startswith(WRITTEN_BY)]


def add_results(folder, results: list[EvalResult], name: str):
    """
    Puts measured results into the card of a folder: `model-index` in its metadata, a table in its text. Results of the
    same data set, configuration and split are replaced, those of others stay.

    Args:
        folder (`str` or `os.PathLike`): A folder that has a card of ours.
        results (`list[EvalResult]`): What was measured with this folder's adapter.
        name (`str`): The model's name in the index, where the card has none yet.
    """
    card = Path(folder, "README.md")
    metadata, body = split_card(card.read_text(encoding="utf-8"))
    old = []
    if metadata.get("model-index"):
        name, old = model_index_to_eval_results(metadata["model-index"])
    new = {result.unique_identifier for result in results}
    results = [result for result in old if result.unique_identifier not in new] + results
    metadata["model-index"] = eval_results_to_model_index(name, results)
    section = f"<!-- lavin:results {adapter_digest(folder)} -->\n{_results(results)}\n<!-- /lavin:results -->"
    if RESULTS.search(body):
        body = RESULTS.sub(lambda _: f"\n\n{section}", body)
    else:
        body = body.replace(END, f"{END}\n\n{section}", 1)
    front = yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)
    replace_text(card, f"---\n{front}---\n{body}")


def _results(results: list[EvalResult]) -> str:
    lines = ["## Results"]
    for key in dict.fromkeys(result.unique_identifier for result in results):
        group = [result for result in results if result.unique_identifier == key]
        names = [result.metric_name or result.metric_type for result in group]
        values = [f"{r.metric_value:.2f}" if isinstance(r.metric_value, float) else r.metric_value for r in group]
        lines += ["", f"{group[0].dataset_name}:", ""]
        for cells in (names, ["---:"] * len(group), values):
            lines.append(f"| {' | '.join(map(str, cells))} |")
        if group[0].dataset_args:
            settings = ", ".join(f"{key} {value}" for key, value in group[0].dataset_args.items())
            lines += ["", f"Measured with `lavin eval`: {settings}."]
    return "\n".join(lines)
