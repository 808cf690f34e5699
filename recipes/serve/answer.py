"""The text of one answer as its tokens arrive: only text that no later token can change is handed out."""

BROKEN = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet


class AnswerText:
    r"""
    Turns tokens into text piece by piece. The pieces in a row are the decoded answer without the white space around
    it, up to the first stop string.

    A character of several tokens, white space that may be the answer's end and what may become a stop string are held
    back until that is decided.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): Only its `decode` is used.
        stop (`list[str]`, *optional*): Strings that end the answer; they are not part of it.
    """

    def __init__(self, tokenizer, stop: list[str] | None = None):
        self.tokenizer = tokenizer
        self.stop = stop or []
        self.tokens = []
        self.start = self.read = 0  # those before `read` are in `raw`; from `start` on they are decoded again
        self.raw = ""
        self.sent = 0
        self.stopped = False

    def push(self, token: int) -> str:
        """Takes one more token and returns the text, maybe none, that is certain now."""
        self.tokens.append(token)
        piece = self._decoded()
        if piece.endswith(BROKEN):
            return ""
        self.start, self.read = self.read, len(self.tokens)
        return self._take(piece)

    def end(self) -> str:
        """What has been held back; nothing can follow."""
        piece = "" if self.stopped else self._decoded()
        self.read = len(self.tokens)
        pieces = self._take(piece)
        return pieces + self._visible(len(self.raw))

    def _decoded(self) -> str:
        """
        Text of the tokens after `read`. Decoded with those before them, which may say whether a space comes first;
        without them where they would change, as single bytes do beside bytes that are no character.
        """
        before = self._decode(self.tokens[self.start : self.read])
        text = self._decode(self.tokens[self.start :])
        return text[len(before) :] if text.startswith(before) else self._decode(self.tokens[self.read :])

    def _decode(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True) if tokens else ""

    def _take(self, piece: str) -> str:
        if self.stopped:
            return ""
        begin = max(0, len(self.raw) - max(map(len, self.stop), default=1) + 1)
        self.raw += piece
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
