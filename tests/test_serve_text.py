"""The text of an answer piece by piece, as `lavin serve` streams it: whole characters, stop strings."""

import random

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lavin.recipes.evaluate.answers import before_end
from lavin.recipes.serve.answer import BROKEN, AnswerText


TEXT = "  Zwölf Boxkämpfer 🥊🥊 jagen 维克多 — naïve 👩‍👩‍👧 stop. STOPPED \n\n the end \n "


def tokenizers():
    """Byte-level, and single characters with bytes for the others, as SentencePiece has."""
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer, byte_level.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    byte_level.train_from_iterator(["the end of it"], trainers.BpeTrainer(initial_alphabet=alphabet, vocab_size=270))
    pieces = [f"<0x{i:02X}>" for i in range(256)] + sorted(set("▁abcdefghijklmnopqrstuvwxyzSTOPED."))
    fallback = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    fallback.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    fallback.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return [PreTrainedTokenizerFast(tokenizer_object=tokenizer) for tokenizer in (byte_level, fallback)]


@pytest.mark.parametrize("tokenizer", tokenizers(), ids=["byte-level", "byte fallback"])
@pytest.mark.parametrize("stop", [(), ("STOP",), ("STOPPER", "the ende"), ("\n\n",), ("🥊",)])
def test_pieces_of_text(tokenizer, stop):
    tokens = tokenizer(TEXT, add_special_tokens=False).input_ids
    assert tokenizer.decode(tokens) == TEXT
    answer, pieces = AnswerText(tokenizer, list(stop)), []
    for token in tokens:
        if not answer.stopped:
            pieces.append(answer.push(token))
    assert sum(map(bool, pieces)) > 3 or stop == ("🥊",)
    pieces.append(answer.end())
    expected = min((TEXT.partition(text)[0] for text in stop), key=len, default=TEXT)
    assert "".join(pieces) == expected.strip() and not any(BROKEN in piece for piece in pieces)
    assert answer.stopped == (expected != TEXT)


@pytest.mark.parametrize("tokenizer", tokenizers(), ids=["byte-level", "byte fallback"])
def test_bytes_that_are_no_text(tokenizer):
    """Random tokens, half of them bytes, cut anywhere."""
    newline = tokenizer.convert_tokens_to_ids("<0x0A>") or tokenizer("\n").input_ids[0]
    rng, broken = random.Random(0), 0
    for _ in range(300):
        anything = range(len(tokenizer))
        tokens = [
            rng.choice([newline, rng.choice(anything), rng.choice(anything)]) for _ in range(rng.randrange(1, 30))
        ]
        answer = AnswerText(tokenizer)
        pieces = [answer.push(token) for token in tokens]
        decoded = tokenizer.decode(tokens)
        assert "".join([*pieces, answer.end()]) == decoded.strip()
        broken += BROKEN in decoded
    assert 50 < broken < 300


def looking_back() -> dict:
    """Tokenizers whose text of a token depends on those around it."""
    words = [
        "A",
        "do",
        "it",
        "the",
        " ",
        " .",
        ".",
        " ,",
        "?",
        " '",
        " n",
        "'",
        "t",
        "n't",
        " s",
        "'s",
        " 've",
        "re",
        "a",
        "S",
    ]

    def of(model, decoder, **kwargs):
        tokenizer = Tokenizer(model)
        tokenizer.decoder = decoder
        tokenizer.add_special_tokens(["</s>"])
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **kwargs)

    def vocabulary(pieces):
        return {piece: i for i, piece in enumerate(pieces)}

    pieces = [*(word.replace(" ", "▁") for word in words), "▁the", "<0xC3>", "<0xA9>", "<0xF0>", "<0x0A>", "é"]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    level = [word.replace(" ", "Ġ") for word in words] + ["Ã", "©", "ð", "Ċ"]
    suffix = [word.strip() + end for word in words if word.strip() for end in ("", "</w>")]
    marked = [word.strip() for word in words if word.strip()] + ["##t", "##the", "[X]"]
    clean = {"clean_up_tokenization_spaces": True}
    forced = {**clean, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": True}
    bpe = models.BPE
    return {
        "SentencePiece": of(bpe(vocabulary(pieces), []), decoders.Sequence(steps)),
        "SentencePiece, stripped": of(
            bpe(vocabulary(pieces), []), decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
        ),
        "SentencePiece, cleaned": of(bpe(vocabulary(pieces), []), decoders.Sequence(steps), **forced),
        "Metaspace": of(bpe(vocabulary(pieces), []), decoders.Metaspace(prepend_scheme="always")),
        "byte-level": of(bpe(vocabulary(level), []), decoders.ByteLevel()),
        "byte-level, cleaned": of(bpe(vocabulary(level), []), decoders.ByteLevel(), **forced),
        "WordPiece": of(models.WordPiece(vocabulary(marked), unk_token="[X]"), decoders.WordPiece(cleanup=False)),
        "WordPiece, cleaned": of(models.WordPiece(vocabulary(marked), unk_token="[X]"), decoders.WordPiece(), **clean),
        "a suffix": of(bpe(vocabulary(suffix), []), decoders.BPEDecoder()),
        "a replacement across tokens": of(
            bpe(vocabulary(pieces), []),
            decoders.Sequence([*steps, decoders.Replace(" .", "."), decoders.Replace("do it", "")]),
        ),
        "an expression": of(
            bpe(vocabulary(pieces), []), decoders.Sequence([*steps, decoders.Replace(Regex(r"\s+([.,])"), "!")])
        ),
    }  # fmt: skip


LOOKING_BACK = looking_back()


@pytest.mark.parametrize("stop", [[], ["."], ["n't", "the"]], ids=["", "one", "two"])
@pytest.mark.parametrize("name", LOOKING_BACK)
def test_a_stream_is_the_decoded_answer(name, stop):
    """As `lavin ask` decodes it, whatever the decoder looks back at; long answers too, of which a part is decoded."""
    tokenizer, chosen, streamed = LOOKING_BACK[name], random.Random(0), 0
    lengths = [chosen.randrange(1, 16) for _ in range(150)] + [500] * (not stop)
    for length in lengths:
        tokens = chosen.choices(range(len(tokenizer)), k=length)
        answer = AnswerText(tokenizer, stop)
        pieces = []
        for token in tokens:
            pieces.append(answer.push(token))
            if answer.stopped:
                break
        streamed += sum(map(bool, pieces))
        pieces.append(answer.end())
        decoded = tokenizer.decode(tokens, skip_special_tokens=True)
        if answer.stopped:
            cuts = [decoded[: decoded.find(text)].strip() for text in stop if text in decoded]
            assert "".join(pieces) in cuts
        else:
            assert "".join(pieces) == decoded.strip() and not any(text in decoded for text in stop)
        assert answer.raw.strip() == "".join(pieces)
    assert streamed > 100 or stop or name == "an expression"
    assert stop or answer.look_back > 99 or answer.start > 300  # not all is decoded again and again


def test_a_stop_string_after_bytes_that_are_no_text():
    tokenizer = tokenizers()[1]
    head, tail = ("▁", "t", "h", "e", "<0x0A>", "<0xF0>", "<0x9F>"), ("▁", "e", "n", "d", "S", "T", "O", "P", "s")
    answer = AnswerText(tokenizer, ["STOP"])
    pieces = [answer.push(tokenizer.convert_tokens_to_ids(piece)) for piece in (*head, *tail)]
    assert answer.stopped and "".join(pieces) == f"the{BROKEN}{BROKEN}{BROKEN} end"  # as it is decoded as a whole


def test_an_answer_without_its_end():
    """The token that ends an answer is no part of its text, in `lavin ask` either, where it is no special one."""
    assert before_end([5, 6, 2, 0, 2], [2, 9]) == [5, 6] and before_end([5, 6], [2]) == [5, 6]
    assert before_end([2], [2]) == before_end([], [2]) == []
