"""
Words of captions as COCO's scorer counts them: what Stanford's PTBTokenizer (3.4.1, `-lowerCase`, Java) makes of a
caption, without punctuation (pycocoevalcap/tokenizer). Written from its behaviour; a test holds its output on real
captions.
"""

import re


# The scorer's own list. Brackets are on it in capitals, and the words are not: they stay.
PUNCTUATION = {
    "''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--", "...", ";",
}  # fmt: skip
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
# Their full stop belongs to them, but not where the text ends; that of the others only before a number.
ABBREVIATIONS = (
    "mr mrs ms dr drs prof st ste jr sr bros vs inc co corp ltd dept univ sen rep gov gen col lt sgt capt rev hon "
    "pres maj adm ave blvd rd mt ft jan feb mar apr jun jul aug sep sept oct nov dec mon tue tues wed thu thurs fri"
).split()
BEFORE_NUMBER = ("no", "nos", "fig", "vol")
WORD = r"[^\W_]+(?:(?:[-_']|(?-i:(?<=[A-Z])&(?=[A-Z])))[^\W_]+)*"
TOKEN = re.compile(
    rf"""
      https?://\S+ | www\.\S+ | [\w.+-]+@[\w-]+(?:\.[\w-]+)+        # addresses
    | (?:{"|".join(ABBREVIATIONS)})\.(?=\s|$)(?!\s*$)                # "Mr.", but not where the text ends
    | etc\. | (?<!\S)'s(?!\w)
    | (?:{"|".join(BEFORE_NUMBER)})\.(?=\s*\d)
    | (?:[a-z]\.){{2,}} | (?<!\w)(?-i:[A-HJ-Z])\.(?!\w)               # "U.S.", "plan B."
    | \d+(?:[.,:]\d+)+(?:-[^\W_]+)* | (?<![\w.])\.\d+ | \d+(?:/\d+)+ # 3.5, 10:30, .5, 1/2
    | '\d\ds?(?!\w) | '(?:n|em|til|tis|twas|cause)\b'?               # '90s, 'n'
    | {WORD}(?:[./](?!\d){WORD})*'?                                 # words; "m/s"; "pizza.a", where a space is missing
    | -{{2,}} | \.{{2,}} | [!?]{{2,}} | \*+ | ''|`` | \S
    """,
    re.X | re.I,
)
PARTS = {
    "cannot": ("can", "not"), "gonna": ("gon", "na"), "gotta": ("got", "ta"), "wanna": ("wan", "na"),
    "lemme": ("lem", "me"), "gimme": ("gim", "me"),
}  # fmt: skip
PLAIN = str.maketrans({"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u00a2": " cents"})


def ptb_words(caption: str) -> list[str]:
    """
    The words of a caption, lower case, without punctuation.

    Example:

    ```python
    >>> ptb_words("A man's dog doesn't like the U.S. flag.")
    ['a', 'man', "'s", 'dog', 'does', "n't", 'like', 'the', 'u.s.', 'flag']
    ```
    """
    text = re.sub(r"[\u2013\u2014]", " -- ", caption.translate(PLAIN))
    words = [word for token in TOKEN.findall(text) for word in _split(token.lower())]
    return [word for word in words if word not in PUNCTUATION]


def _split(token: str) -> list[str]:
    """Contractions apart, brackets by their names, quotes and dashes as punctuation."""
    if token in PARTS:
        return list(PARTS[token])
    if token in BRACKETS:
        return [BRACKETS[token]]
    if token == '"' or re.fullmatch(r"-{2,}|\.{2,}", token):
        return ["--"]
    if found := re.fullmatch(r"(.+)(n't)", token) or re.fullmatch(r"(.+)('(?:s|m|d|re|ve|ll))", token):
        return [*_split(found[1]), found[2]]
    if len(token) > 1 and token.endswith("'"):  # of a plural, or a quotation's end
        return [token] if token[0] == "'" else [*_split(token[:-1]), "'"]
    return [token]
