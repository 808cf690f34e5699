"""What the adapter does to plain text: perplexity and multiple choice of the base, with the adapter, with it off."""

import gc
import json
import math
import os
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from lavin.files_lavin import ADAPTER_NAME, read_text

from ..load import default_device, default_dtype, load_model
from ..report import markdown_table
from .predictions import model_identity
from .run import check_positive, write_results


BASE, ADAPTER, OFF = "base alone", "adapter on text", "adapter off"


def read_data(files: list[str | os.PathLike]) -> tuple[list[str], list[dict]]:
    """
    Reads texts and multiple-choice questions.

    Args:
        files (`list[str]`): Plain text, each file one document; or JSONL, whose rows have `text`, or `question`,
            `choices` and `answer` (index).

    Returns:
        `tuple(list[str], list[dict])`: documents and questions.

    Raises:
        `OSError`, `ValueError`: if a file cannot be read or a row is neither.
    """
    documents, questions = [], []
    for file in map(Path, files):
        if not file.is_file():
            raise FileNotFoundError(f"There is no file {file}.")
        content = read_text(file)
        if file.suffix not in (".jsonl", ".json"):
            documents.append(content)
            continue
        for number, line in enumerate(content.splitlines(), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                if "text" in row:
                    documents.append(row["text"] + "")
                    continue
                choices, answer = [choice + "" for choice in row["choices"]], row["answer"]
                if not all(choices) or not isinstance(answer, int) or not 0 <= answer < len(choices):
                    raise ValueError("its answer is no index of its choices, or a choice is empty")
                questions.append({"question": row["question"] + "", "choices": choices, "answer": answer})
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f'{file}, line {number}: a row has "text", or "question", "choices" and "answer" (index): {error}.'
                ) from error
    documents = [document for document in documents if document.strip()]
    if not documents and not questions:
        raise ValueError(f"There is no text and no question in {', '.join(map(str, files))}.")
    return documents, questions


def text_windows(tokenizer, documents: list[str], length: int) -> list[tuple[list[int], int]]:
    """Documents in pieces of `length` tokens that do not overlap, each after a BOS: ids, and how many are given."""
    begin = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    windows, size = [], length - len(begin)
    for document in documents:
        ids = tokenizer(document, add_special_tokens=False).input_ids
        windows += [(begin + ids[i : i + size], max(1, len(begin))) for i in range(0, len(ids), size)]
    return [window for window in windows if len(window[0]) > window[1]]


def choice_rows(tokenizer, questions: list[dict]) -> list[tuple[list[int], int]]:
    """Every choice after its question: ids, and how many of them are the question's."""
    begin, rows = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else [], []
    for question in questions:
        context = f"Question: {question['question']}\nAnswer:"
        texts = [context, *(f"{context} {choice}" for choice in question["choices"])]
        context_ids, *whole = tokenizer(texts, add_special_tokens=False).input_ids
        rows += [(begin + ids, len(begin) + len(context_ids)) for ids in whole]
    return rows


@torch.inference_mode()
def log_likelihoods(model, rows: list[tuple[list[int], int]], batch_size: int, progress: str) -> list[torch.Tensor]:
    """
    Log-probability of each token that is not given.

    Args:
        model ([`PreTrainedModel`]): Any causal language model, or a LaVIN.
        rows (`list[tuple]`): Ids, and how many at their beginning are given.
        batch_size (`int`): Rows at once, padded on the right.
        progress (`str`): Name of the progress bar.

    Returns:
        `list[torch.Tensor]`: for each row a float32 vector.
    """
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i][0]), i))
    scores: list = [None] * len(rows)
    with tqdm(total=len(rows), desc=progress, unit="row") as bar:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            longest = max(len(rows[i][0]) for i in chosen)
            ids = torch.zeros(len(chosen), longest, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for place, i in enumerate(chosen):
                ids[place, : len(rows[i][0])], mask[place, : len(rows[i][0])] = torch.tensor(rows[i][0]), 1
            ids, mask = ids.to(model.device), mask.to(model.device)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for place, i in enumerate(chosen):
                row, given = rows[i]
                predicted = logits[place, given - 1 : len(row) - 1].float().log_softmax(-1)
                scores[i] = predicted.gather(-1, ids[place, given : len(row), None]).squeeze(-1).cpu()
            bar.update(len(chosen))
    return scores


def choice_accuracy(questions: list[dict], scores: list[torch.Tensor]) -> float:
    """
    Percent of questions whose right choice is the most likely one per character (lm-evaluation-harness's `acc_norm`).

    Args:
        questions (`list[dict]`): Each with `choices` and `answer`.
        scores (`list[torch.Tensor]`): Log-probabilities of every choice's tokens, one choice after the other.
    """
    rest, right = iter(scores), 0
    for question in questions:
        likely = [float(next(rest).double().sum()) / len(choice) for choice in question["choices"]]
        right += max(range(len(likely)), key=likely.__getitem__) == question["answer"]
    return 100 * right / len(questions)


def base_alone(model) -> torch.nn.Module:
    """
    The plain causal language model under a LaVIN, in transformers' own class: from the checkpoint that a light folder
    names, or, where the base's weights are in a LaVIN folder, from these.
    """
    config, device, dtype = model.config, model.device, model.get_input_embeddings().weight.dtype
    source = config.text_checkpoint
    if source is not None and config.base_checkpoint is None:
        revision = source.get("revision") or "main"
        return AutoModelForCausalLM.from_pretrained(source["name"], revision=revision, dtype=dtype).to(device).eval()
    with torch.device(device):
        plain = AutoModelForCausalLM.from_config(config.text_config, dtype=dtype)
    getattr(plain, plain.base_model_prefix).load_state_dict(_base_weights(model.model.language_model))
    plain.lm_head.load_state_dict(_base_weights(model.lm_head))
    plain.tie_weights()
    return plain.eval()


def _base_weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    weights = {name: tensor for name, tensor in module.state_dict().items() if ".adapter_" not in name}
    return {
        name.replace(".base_layer", "").replace("original_module.", ""): tensor
        for name, tensor in weights.items()
        if "modules_to_save." not in name
    }


def _tokenizer(model, processor):
    """The base's own: LaVIN's leaves out the word-start marker that its language model expects of a text."""
    source = model.config.text_checkpoint
    if source is None:
        return processor.tokenizer
    return AutoTokenizer.from_pretrained(source["name"], revision=source.get("revision") or "main")


def evaluate_text(
    model: str | os.PathLike,
    data: list[str | os.PathLike],
    output: str | os.PathLike,
    batch_size: int | None = None,
    max_length: int = 1024,
    device: str | None = None,
    dtype: str | None = None,
) -> tuple[dict, str]:
    """
    Measures three on the same ids: the base alone, the model with its adapter, the model with its adapter off.

    Args:
        model (`str` or `os.PathLike`): A LaVIN folder or Hub name, with an adapter.
        data (`list[str]`): Files, see [`read_data`].
        output (`str` or `os.PathLike`): The folder for the results.
        batch_size (`int`, *optional*): Rows at once; 8 by default.
        max_length (`int`, *optional*, defaults to 1024): Tokens of one piece of a document, BOS included.
        device, dtype (`str`, *optional*): As of [`~load.load_model`].

    Returns:
        `tuple(dict, str)`: what `results.json` holds, and the table.

    Raises:
        `OSError`, `ValueError`: if the model has no adapter, or a file is not right.
    """
    check_positive(batch_size=batch_size, max_length=max_length)
    documents, questions = read_data(data)
    device = default_device() if device is None else device
    dtype = default_dtype(device) if dtype is None else dtype
    lavin, processor = load_model(model, device, dtype)
    if ADAPTER_NAME not in getattr(lavin, "peft_config", {}):
        raise ValueError(f"{model} has no adapter ({ADAPTER_NAME}/): there is nothing to compare with its base.")
    tokenizer = _tokenizer(lavin, processor)
    limit = getattr(lavin.config.text_config, "max_position_embeddings", None) or max_length
    texts = text_windows(tokenizer, documents, min(max_length, limit))
    rows = texts + choice_rows(tokenizer, questions)
    if not rows:
        raise ValueError("The texts are too short: there is no token to predict.")
    too_long = [row for row in rows if len(row[0]) > limit]
    if too_long:
        raise ValueError(f"{len(too_long)} questions with a choice are longer than the model's {limit} tokens.")

    started, scores = time.time(), {}
    plain = base_alone(lavin)
    scores[BASE] = log_likelihoods(plain, rows, batch_size or 8, BASE)
    del plain
    gc.collect()
    scores[ADAPTER] = log_likelihoods(lavin, rows, batch_size or 8, ADAPTER)
    lavin.disable_adapters()
    scores[OFF] = log_likelihoods(lavin, rows, batch_size or 8, OFF)
    seconds = time.time() - started

    table = []
    for name, of_rows in scores.items():
        line, of_texts = {"": name}, of_rows[: len(texts)]
        if texts:
            line["perplexity"] = math.exp(
                -sum(float(row.double().sum()) for row in of_texts) / sum(map(len, of_texts))
            )
        if questions:
            line["accuracy"] = choice_accuracy(questions, of_rows[len(texts) :])
        table.append(line)
    equal = sum(int((a == b).sum()) for a, b in zip(scores[BASE], scores[OFF], strict=True))
    tokens = sum(map(len, scores[BASE]))
    results = _results(model, data, documents, questions, table, seconds, len(rows), device, dtype)
    results.update(tokens=tokens, tokens_equal=equal, bit_equal=equal == tokens)
    lines = [f"{results['dataset']['name']}: {tokens} tokens predicted", "", markdown_table(table), ""]
    if texts:
        lines.append(f"Perplexity per token, in {len(texts)} pieces of up to {min(max_length, limit)} tokens.")
    if questions:
        lines.append(f"Accuracy in percent over {len(questions)} questions; log-likelihood per character of a choice.")
    same = "equal bit for bit, at each token" if equal == tokens else f"NOT EQUAL at {tokens - equal} tokens"
    lines.append(f"{OFF[0].upper()}{OFF[1:]} and {BASE}: {same}.")
    text = "\n".join(lines)
    return write_results(output, results, text), text


def _results(model, data, documents, questions, table, seconds, rows, device, dtype) -> dict:
    scores, types = {}, {}
    for line in table[:2]:
        for metric in ("perplexity", "accuracy"):
            if metric in line:
                name = metric if line[""] == ADAPTER else f"{metric} ({line['']})"
                scores[name], types[name] = round(line[metric], 4), metric
    return {
        "task": "text",
        "dataset": {
            "name": ", ".join(Path(file).name for file in data), "hub": None, "split": None,
            "questions": len(questions), "documents": len(documents), "images": False,
        },
        "scores": scores, "metric_types": types, "table": table,
        "model": {"name": str(model), **model_identity(model)}, "settings": {"dtype": dtype}, "device": device,
        "asked": rows, "seconds": round(seconds, 2), "samples_per_second": round(rows / seconds, 2),
    }  # fmt: skip
