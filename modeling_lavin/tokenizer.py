"""The base model's tokenizer as LaVIN's text format needs it."""

import json
import logging
import os
from importlib import import_module

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast
from transformers.utils import is_sentencepiece_available


logger = logging.getLogger(__name__)
# What a tokenizer made of SentencePiece's file is compared with it on.
PROBES = (
    "BECAUSE:  The answer is B.\n\n   Two\tlines,\t\tand  it's 3.14%: {x}",
    " ".join(f"{' ' * n}of{' ' * n}" for n in range(17)),
    "Größe 中文 日本語 русский العربية 👍🏽 é…\u00a0x",
)


def without_word_start(tokenizer) -> PreTrainedTokenizerFast:
    """
    The same vocabulary without the word-start marker that SentencePiece-like tokenizers put before every text: TRL
    tokenises prompt and completion apart, and the answer would begin with "▁The" instead of "The".
    """
    if not tokenizer.is_fast:
        raise ValueError(f"LaVIN needs a fast tokenizer, and {type(tokenizer).__name__} has no fast version.")
    spec = json.loads(tokenizer.backend_tokenizer.to_str())

    def strip(node):
        if isinstance(node, list):
            return [child for child in map(strip, node) if child is not None]
        if isinstance(node, dict):
            if node.get("type") in ("Prepend", "Strip"):  # the decoder's Strip undoes Prepend
                return None
            never = {"Metaspace": {"prepend_scheme": "never"}, "ByteLevel": {"add_prefix_space": False}}
            return {key: strip(value) for key, value in node.items()} | never.get(node.get("type"), {})
        return node

    for part in ("normalizer", "pre_tokenizer", "decoder"):
        spec[part] = strip(spec[part])
    spec = _as_sentencepiece(spec, tokenizer)

    result = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        padding_side="left",
        extra_special_tokens=list(tokenizer.extra_special_tokens),
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=tokenizer.model_max_length,
        clean_up_tokenization_spaces=False,
        **tokenizer.special_tokens_map,
    )
    if result.pad_token in (None, result.eos_token):
        result.pad_token = _pad_token(result)
    return result


def _as_sentencepiece(spec: dict, tokenizer) -> dict:
    """
    The specification of a tokenizer that was made of SentencePiece's `tokenizer.model`, its merges in that file's
    order. A `tokenizer.json` beside it may hold others for a reason: it is mended only where that is seen to help.
    """
    file = str(getattr(tokenizer, "vocab_file", None))
    try:
        # Brought by no dependency: transformers asks for it where a folder has nothing but this file.
        found = file.endswith(".model") and is_sentencepiece_available()
        pieces = import_module("sentencepiece").SentencePieceProcessor(model_file=file) if found else None
    except (RuntimeError, OSError):  # no file of SentencePiece's
        pieces = None
    if pieces is None:
        return spec

    def wrong(spec):
        ours = Tokenizer.from_str(json.dumps(spec))
        # SentencePiece puts a space before every text, we do not.
        return [
            text for text in PROBES if ours.encode(" " + text, add_special_tokens=False).ids != pieces.encode(text)
        ]

    alone = not os.path.isfile(os.path.join(os.path.dirname(file), "tokenizer.json"))
    if spec["model"]["type"] == "BPE":
        mended = {**spec, "model": {**spec["model"], "merges": _merges_by_score(spec["model"]["merges"], pieces)}}
        if alone or (wrong(spec) and not wrong(mended)):
            spec = mended
    if alone and (texts := wrong(spec)):
        logger.warning(
            f"The tokens made of {file} differ from SentencePiece's own, of {texts[0]!r} for example. If the language "
            "model comes with a `tokenizer.json`, put it beside that file: it is read in its place."
        )
    return spec


def _merges_by_score(merges: list, pieces) -> list:
    """
    The merges in SentencePiece's order: by the score of the piece that results. transformers orders them by its id,
    but some pieces have a low id and the lowest score: two spaces would be joined before " The" is. SentencePiece
    joins what has the same score from the left on, which is what merges that make the longer piece first do.
    """
    score = {}
    for i in range(pieces.get_piece_size()):
        if not (pieces.is_control(i) or pieces.is_byte(i) or pieces.is_unknown(i)):  # none of these is ever merged
            score[pieces.id_to_piece(i)] = pieces.get_score(i)
    known = [pair for pair in merges if "".join(pair) in score]
    return sorted(known, key=lambda pair: (-score["".join(pair)], -len("".join(pair))))


def _pad_token(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """
    A token for padding that is never a label: collators that hide the pad token's id from the loss would hide EOS with
    it, and the model would not learn to stop. Only tokens that have a row in the embedding count. Where every special
    token is EOS (GPT-2), EOS it is: TRL takes its labels from the attention mask and is not affected.
    """
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    spare = [token for word in ("pad", "reserved") for token in special if word in token]
    for token in [tokenizer.unk_token, *spare]:
        if token and token not in (tokenizer.bos_token, tokenizer.eos_token):
            return token
    return tokenizer.eos_token
