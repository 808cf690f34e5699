"""The text of one answer as its tokens arrive: only text that no later token can change is handed out."""

import json
import re

from ..evaluate.answers import decode


BROKEN = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet
BYTE = re.compile("<0x[0-9A-F]{2}>")  # SentencePiece's tokens for what it has no piece for
CLEAN_UP = 19  # characters that transformers' clean-up of spaces can look back over, all its replacements in a row
UNKNOWN = 2**60  # characters: nothing is certain before the end
WINDOW = 16  # tokens that are decoded again with each new one, at least


class AnswerText:
    r"""
    Turns tokens into text piece by piece. The pieces in a row are the decoded answer, as `lavin ask` gives it, without
    the white space around it and up to the first stop string.

    What a later token may change is held back until it is decided: a character of several tokens, single bytes in a
    row (one that is wrong breaks them all), as much text as the decoder may look back over, white space that may be
    the answer's end, and what may become a stop string.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): Its `decode` is used.
        stop (`list[str]`, *optional*): Strings that end the answer; they are not part of it.
    """

    def __init__(self, tokenizer, stop: list[str] | None = None):
        self.tokenizer = tokenizer
        self.stop = stop or []
        self.look_back = look_back(tokenizer)
        known = getattr(tokenizer, "added_tokens_decoder", {})
        self.special = {token for token, added in known.items() if added.special}
        self.tokens = []
        self.start, self.before = 0, ""  # where the tokens that are decoded again begin, and the text before them
        self.raw = ""  # the text that is certain; in the end, the answer
        self.sent = 0
        self.stopped = False

    def push(self, token: int) -> str:
        """Takes one more token and returns the text, maybe none, that is certain now."""
        self.tokens.append(token)
        if token in self.special or self._is_byte(token):
            return ""
        text = self.before + decode(self.tokenizer, self.tokens[self.start :])
        if len(self.tokens) - self.start >= 2 * WINDOW and len(self.tokens) % WINDOW == 0:
            self._move_on(text)
        return self._take(text, len(text.rstrip(BROKEN)) - self.look_back)

    def end(self) -> str:
        """What has been held back; nothing can follow."""
        if self.stopped:
            return ""
        text = decode(self.tokenizer, self.tokens)
        pieces = self._take(text, len(text))
        return pieces + self._visible(len(self.raw))

    def _is_byte(self, token: int) -> bool:
        names = getattr(self.tokenizer, "convert_ids_to_tokens", str)
        return BYTE.fullmatch(names(token) or "") is not None

    def _move_on(self, text: str):
        """Leaves the first tokens out from here on, where those after them give the same text without them."""
        start = len(self.tokens) - WINDOW
        rest = decode(self.tokenizer, self.tokens[start:])
        in_run = any(self._is_byte(token) or token in self.special for token in self.tokens[start - 1 : start + 1])
        if not in_run and self.look_back < len(rest) and text.endswith(rest):
            self.start, self.before = start, text[: len(text) - len(rest)]

    def _take(self, text: str, certain: int) -> str:
        if self.stopped:
            return ""
        begin = max(0, len(self.raw) - max(map(len, self.stop), default=1) + 1)
        self.raw = text[: max(certain, len(self.raw))]
        found = [i for i in (self.raw.find(stop, begin) for stop in self.stop) if i >= 0]
        if found:
            self.raw, self.stopped = self.raw[: min(found)], True
            return self._visible(len(self.raw))
        return self._visible(len(self.raw) - self._start_of_a_stop())

    def _start_of_a_stop(self) -> int:
        """Length of the longest end of the text that a stop string begins with."""
        longest = 0
        for stop in self.stop:
            for length in range(min(len(stop) - 1, len(self.raw)), longest, -1):
                if self.raw.endswith(stop[:length]):
                    longest = length
                    break
        return longest

    def _visible(self, end: int) -> str:
        text = self.raw[:end].rstrip()
        begin = max(self.sent, len(self.raw) - len(self.raw.lstrip()))
        self.sent = max(self.sent, len(text))
        return text[begin:]


def look_back(tokenizer) -> int:
    """Characters at the end of a text that further tokens may change, beside unfinished characters and bytes."""
    characters = CLEAN_UP if getattr(tokenizer, "clean_up_tokenization_spaces", False) else 0
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    spec = json.loads(decoder.__getstate__()) if decoder is not None else {}
    for step in spec.get("decoders", [spec]):
        if step.get("type") == "Replace":
            pattern = step["pattern"].get("String")
            characters += UNKNOWN if pattern is None else len(pattern) - 1
        elif step.get("type") == "CTC":
            characters += UNKNOWN
    return characters
