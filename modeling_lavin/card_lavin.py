"""The model card: `model_card.md` with the real numbers of the model."""

import hashlib
import os
import re
from pathlib import Path

import yaml
from peft import inject_adapter_in_model
from transformers.utils import cached_file

from .files_lavin import replace_text
from .trainable_lavin import without_weights
from .tuner_lavin import MMAConfig


BEGIN, END = "<!-- lavin:facts -->", "<!-- /lavin:facts -->"
# Measured results stand between these; the first names the adapter that was measured.
RESULTS = re.compile(r"\n*<!-- lavin:results (\S*) -->.*?<!-- /lavin:results -->", flags=re.S)
ADAPTER_FILE = "mma/adapter_model.safetensors"


def adapter_digest(folder) -> str | None:
    """SHA-256 of a folder's adapter file, by which results know what was measured; `None` where there is none."""
    file = Path(folder, ADAPTER_FILE)
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def write_card(model, folder):
    """
    Writes `README.md`. The text between the two marks and a few fields of the metadata are made from the model; what
    the user wrote around them stays, and so do measured results, unless they belong to another adapter than the
    folder's. A README of somebody else is left alone, unless a trainer generated it.
    """
    target = Path(folder, "README.md")
    old = target.read_text(encoding="utf-8") if target.is_file() else None
    if old is not None and BEGIN not in old and "generated_from_trainer" not in old:
        return
    metadata, body = split_card(old if old and BEGIN in old else _template(model))
    measured = RESULTS.search(body)
    if measured and measured[1] != str(adapter_digest(folder)):  # trained further since
        metadata, body = {k: v for k, v in metadata.items() if k != "model-index"}, RESULTS.sub("", body)
    facts = f"{BEGIN}\n{_facts(model)}\n{END}"
    body = re.sub(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: facts, body, flags=re.S)
    front = yaml.safe_dump(_metadata(model, metadata), sort_keys=False, allow_unicode=True)
    replace_text(target, f"---\n{front}---\n{body}")


def _template(model) -> str:
    """The card of the folder the model came from, or the package's template."""
    source, hub = getattr(model, "source", ("", {}))
    found = os.path.join(source, "README.md") if source and os.path.isdir(source) else None
    if source and found is None:
        try:
            found = cached_file(source, "README.md", _raise_exceptions_for_missing_entries=False, **hub)
        except OSError:  # out of reach now: the template will do
            found = None
    for path in (found, Path(__file__).with_name("model_card.md")):
        if path is not None and os.path.isfile(path):
            text = Path(path).read_text(encoding="utf-8")
            if BEGIN in text:
                return text
    return f"\n# LaVIN\n\n{BEGIN}\n{END}\n"


def split_card(text: str) -> tuple[dict, str]:
    """Metadata and body of a card."""
    match = re.match(r"---\n(.*?)\n---\n(.*)", text, flags=re.S)
    return (yaml.safe_load(match[1]) or {}, match[2]) if match else ({}, text)


def _metadata(model, old: dict) -> dict:
    config = model.config
    pair = [config.text_checkpoint, config.vision_checkpoint]
    names = [source["name"] for source in ([config.base_checkpoint] if config.base_checkpoint else pair) if source]
    # The Hub refuses a card whose base_model is a local path.
    names = [name for name in names if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not os.path.exists(name)]
    new = {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "license": "apache-2.0", **old}
    new["tags"] = list(dict.fromkeys([*old.get("tags", []), "lavin", "mma", "peft"]))
    new.pop("base_model", None)
    return {**new, "base_model": names} if names else new


def _facts(model) -> str:
    config = model.config
    rows = []
    for kind in ("vision", "text", "base"):
        source = getattr(config, f"{kind}_checkpoint")
        tower = getattr(config, f"{kind}_config", None)
        name = "weights in this repository" if source is None else os.path.basename(source["name"].rstrip("/"))
        if source is not None and not os.path.isabs(source["name"]):
            name = f"[{source['name']}](https://huggingface.co/{source['name']})"
        if source is not None and source.get("revision"):
            name += f" at `{source['revision'][:12]}`"
        if tower is not None:
            rows.append((f"{kind.capitalize()} tower", f"{tower.model_type}, {name}"))
        elif source is not None:
            rows.append(("Base", name))
    read = [f"blocks {config.vision_feature_layers}"] * config.reads_taps
    read += [f"{config.pool_size} x {config.pool_size} cells of the last hidden state"] * config.reads_pool
    rows.append(("Image tokens", f"{config.num_image_tokens}, {', then '.join(read)}"))
    name, adapter = next(
        ((n, a) for n, a in getattr(model, "peft_config", {}).items() if a.peft_type.value == "MMA"), (None, None)
    )
    if adapter is None:  # what `mma: {}` will train
        name, adapter = "mma", MMAConfig()
        model = without_weights(model)
        inject_adapter_in_model(adapter, model, name)
    trained = sum(p.numel() for n, p in model.named_parameters() if f".{name}." in n)
    rows.append(("Trainable parameters", f"{trained:,}"))
    settings = ("r", "groups", "scale", "router_temperature", "dropout")
    rows.append(("Adapter", ", ".join(f"{key} {getattr(adapter, key)}" for key in settings)))
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
