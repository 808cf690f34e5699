"""The base model's tokenizer as LaVIN's text format needs it."""

import json

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast


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
