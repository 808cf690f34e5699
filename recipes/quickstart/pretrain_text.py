"""Trains the quickstart's tiny language model: a Llama, and its own BPE, that reads, recalls and picks a letter."""

import math
import random
import time
from collections.abc import Callable

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..data.scienceqa import ANSWER_START, format_answer, format_question
from .copying import structured_start
from .world import (
    ATTRIBUTES,
    DIGITS,
    NAMES,
    OPPOSITES,
    SOUNDS,
    Drawing,
    context_problem,
    digit_problem,
    drawing_problem,
    knowledge_problem,
    make_problem,
)  # fmt: skip


SLOTS = 6  # places between "Image:" and the question: as many as LaVIN has image tokens
WORDS = sorted({*sum(ATTRIBUTES.values(), []), *sum(OPPOSITES, ()), *SOUNDS, *SOUNDS.values(), *NAMES})
BLANK = "<slot>"  # stands for one of them while a row is written; no token of the vocabulary


def text_config(vocab_size: int) -> LlamaConfig:
    """The language model's shape: width 128, 4 layers, tied (0.9M parameters)."""
    return LlamaConfig(
        vocab_size=vocab_size, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip


def sample_row(rng: random.Random, lesson: float = 0.0) -> tuple[dict, list[str]]:
    """
    Draws one question for pre-training.

    Args:
        rng (`random.Random`): Source of the randomness.
        lesson (`float`, *optional*, defaults to 0.0): Share of the easy lesson "which letter stands before a word".

    Returns:
        `tuple`: a ScienceQA record, and the words its image slots hold (empty: a text-only row).
    """
    if rng.random() < lesson:
        word = rng.choice(WORDS)
        return make_problem(f"Which option says {word}?", word, WORDS, f"It says {word}.", rng), []
    kind = rng.random()
    if kind < 0.4:
        drawing = Drawing.sample(rng)
        words = [drawing.background, drawing.colour, drawing.size, drawing.count, drawing.kind]
        words.append(rng.choice(words))
        rng.shuffle(words)
        return drawing_problem(drawing, rng), words
    if kind < 0.52:
        digit = rng.randrange(10)
        words = [DIGITS[digit]] * rng.choice([1, 2, 6])
        words += rng.choices(["digit", "It", "shows", "a", "the"], k=SLOTS - len(words))
        rng.shuffle(words)
        return digit_problem(digit, rng), words
    return (context_problem(rng) if kind < 0.76 else knowledge_problem(rng)), []


def row_text(problem: dict, has_image: bool) -> tuple[str, str]:
    """Returns prompt and answer of a row, the image slots as `BLANK`."""
    prefix = "Image: " + (" ".join([BLANK] * SLOTS) if has_image else "N/A")
    return f"{prefix} {format_question(problem)}", format_answer(problem)


def train_tokenizer(vocab_size: int = 640, rows: int = 20000, seed: int = 0) -> PreTrainedTokenizerFast:
    """Trains a BPE on the questions' own text. Words end in a marker, so leading spaces and newlines do not matter."""
    rng = random.Random(f"tokenizer {seed}")
    texts = (" ".join(row_text(sample_row(rng, 0.05)[0], False)) for _ in range(rows))
    end = "</w>"
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix=end))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(r"[A-Za-z]+:"), "isolated"),  # "Response:The" is two words
            pre_tokenizers.Split(Regex(r"[.?!,]$"), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(end, " "), decoders.Fuse()]
        + [decoders.Replace(f" {mark}", mark) for mark in ".?!,"]
        + [decoders.Strip(" ", 0, 1)]
    )
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    alphabet = [chr(code) for code in range(33, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=alphabet,
        end_of_word_suffix=end,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        model_max_length=512, clean_up_tokenization_spaces=False,
    )  # fmt: skip


class Rows:
    """Endless stream of batches that asks most what is still answered wrongly."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int, weights: tuple[float, float] = (0.5, 0.1)):
        self.tokenizer, self.rng, self.weights = tokenizer, random.Random(f"text {seed}"), weights
        self.cache: dict[str, list[int]] = {}
        self.failures: dict[tuple, float] = {}  # running error rate of each kind of question

    def draw(self, lesson: float, candidates: int = 4) -> tuple[dict, list[str], tuple]:
        """Draws some questions and keeps one, the likelier the more often its kind is still answered wrongly."""
        rows = []
        for _ in range(candidates):
            problem, words = sample_row(self.rng, lesson)
            kind = (problem["skill"], problem["category"], bool(words))
            rows.append((problem, words, kind))
        return self.rng.choices(rows, [0.04 + self.failures.get(row[-1], 0.6) for row in rows])[0]

    def mark(self, kinds: list[tuple], right: torch.Tensor):
        """Keeps count of what was answered wrongly."""
        for kind, ok in zip(kinds, right.tolist(), strict=True):
            self.failures[kind] = 0.97 * self.failures.get(kind, 0.6) + 0.03 * (not ok)

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, word by word (words never merge, so a cache is exact)."""
        for word in text.split():
            if word not in self.cache:
                self.cache[word] = self.tokenizer(word, add_special_tokens=False).input_ids
        return [token for word in text.split() for token in self.cache[word]]

    def hardest(self, number: int = 4) -> str:
        """The kinds of questions that fail most, with their error rates."""
        worst = sorted(self.failures.items(), key=lambda item: -item[1])[:number]
        return ", ".join(f"{kind[0]}/{kind[1]} {rate:.2f}" for kind, rate in worst)

    def batch(self, size: int, lesson: float, candidates: int = 4) -> dict[str, torch.Tensor]:
        """
        Returns `size` rows, padded on the right.

        Returns:
            `dict`: `input_ids` and `labels` `(size, length)`, `weights` of the loss at each label (deciding letter 1,
            the rest of the answer and the prompt less), `slots` `(size, 6, 6)`: ids of each slot's word first,
            then of the row's other words; `has_image` and `letter` (place of the letter in `labels`) `(size,)`.
        """
        rows, kinds = [], []
        for _ in range(size):
            problem, words, kind = self.draw(lesson, candidates)
            kinds.append(kind)
            prompt, answer = row_text(problem, bool(words))
            before, _, after = prompt.rpartition(BLANK) if words else ("", "", prompt)
            head = [1, *(self.ids("Image:") + [3] * SLOTS if words else [])]
            prompt_ids = head + self.ids(after)
            answer_ids = self.ids(answer) + [2]
            letter = len(prompt_ids) + len(self.ids(ANSWER_START))
            slots = [self.ids(word)[0] for word in words] or [3] * SLOTS
            rows.append((prompt_ids, answer_ids, letter, slots, bool(words)))
        length = max(len(p) + len(a) for p, a, *_ in rows)
        ids = torch.full((size, length), 3)
        weights = torch.zeros(size, length)
        slots = torch.zeros(size, SLOTS, SLOTS, dtype=torch.long)
        for i, (prompt_ids, answer_ids, letter, words, has_image) in enumerate(rows):
            ids[i, : len(prompt_ids) + len(answer_ids)] = torch.tensor(prompt_ids + answer_ids)
            weights[i, len(prompt_ids) : len(prompt_ids) + len(answer_ids)] = self.weights[0] / len(answer_ids)
            start = 2 + SLOTS if has_image else 1
            weights[i, start : len(prompt_ids)] = self.weights[1] / (len(prompt_ids) - start)
            weights[i, letter] = 1.0
            slots[i] = torch.tensor([words[k:] + words[:k] for k in range(SLOTS)])
        has_image = torch.tensor([row[-1] for row in rows])
        return {"input_ids": ids, "weights": weights, "slots": slots, "has_image": has_image,
                "letter": torch.tensor([row[2] for row in rows]), "kinds": kinds}  # fmt: skip


def embed(
    model: LlamaForCausalLM, batch: dict[str, torch.Tensor], noise: float, generator: torch.Generator
) -> torch.Tensor:
    """
    Embeds a batch; an image slot holds its word's embedding, mixed with the row's other words, rescaled and blurred,
    as the output of an imperfect projector would be.
    """
    table = model.get_input_embeddings()
    states = table(batch["input_ids"])
    rows = batch["has_image"].nonzero().squeeze(-1)
    if len(rows) == 0:
        return states

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    words = table(batch["slots"][rows])  # (rows, slots, words, width): the slot's own word first
    share = torch.cat([torch.ones(len(rows), SLOTS, 1), noise * 0.5 * rand(len(rows), SLOTS, SLOTS - 1).square()], -1)
    mixed = (words * share.unsqueeze(-1)).sum(2)
    scale = ((rand(len(rows), SLOTS, 1) * 2 - 1) * noise * math.log(2.5)).exp()
    spread = table.weight.detach().std()
    # dimension 0 starts as a constant, which a projector does not know about: it is blurred away too
    blur = torch.randn(mixed.shape, generator=generator) * spread * noise * rand(len(rows), SLOTS, 1)
    soft = mixed * scale + blur
    where = rows.unsqueeze(1).expand(-1, SLOTS), torch.arange(2, 2 + SLOTS).expand(len(rows), -1)
    return states.index_put(where, soft)


def teach(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, learning_rate: float,
    lesson: Callable[[int], float], noise: Callable[[int], float], candidates: int, seed: int,
    batch_size: int = 32, until: float | None = None,
):  # fmt: skip
    """
    Trains the language model for a while: AdamW, a short warm-up, a flat half, a linear decay.

    Args:
        model (`LlamaForCausalLM`): The model, changed in place.
        tokenizer (`PreTrainedTokenizerFast`): Its tokenizer.
        steps (`int`): Optimizer steps.
        learning_rate (`float`): Peak rate.
        lesson (`Callable`): Share of the easy lesson at each step.
        noise (`Callable`): How unlike clean words the image slots are at each step, 0 to 1.
        candidates (`int`): From how many questions each row is chosen, the hard ones first (1: no choice).
        seed (`int`): Seed of rows and noise.
        batch_size (`int`, *optional*, defaults to 32): Rows per step.
        until (`float`, *optional*): Stops early once this share of the last 50 steps' letters was right.
    """
    generator = torch.Generator().manual_seed(seed)
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.02}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 50) * min(1, (steps - step) / (0.5 * steps))
    )
    rows, start, seen, recent = Rows(tokenizer, seed), time.time(), [], []
    model.train()
    for step in range(steps):
        batch = rows.batch(batch_size, lesson(step), candidates)
        logits = model(inputs_embeds=embed(model, batch, noise(step), generator), use_cache=False).logits
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten(), reduction="none")
        loss = (losses * batch["weights"][:, 1:].flatten()).sum() / batch_size
        if not math.isfinite(loss.item()):
            raise FloatingPointError("the language model's loss is not finite")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        seen.append(letters_right(logits, batch))
        rows.mark(batch["kinds"], seen[-1][0])
        recent = [*recent[-49:], seen[-1][0].float().mean().item()]
        if until and len(recent) == 50 and sum(recent) / 50 > until:
            break
        if step % 100 == 99 or step == steps - 1:
            right, image = (torch.cat([part[i] for part in seen]) for i in (0, 1))
            scores = f"text {right[~image].float().mean():.3f}  slots {right[image].float().mean():.3f}"
            clock = f"{time.time() - start:.0f} s"
            print(f"text {step + 1:5d}  {scores}  {clock}  hard: {rows.hardest()}", flush=True)
            seen = []
    model.eval()


def train_text(
    tokenizer: PreTrainedTokenizerFast,
    steps: int = 1300,
    more_steps: int = 500,
    lesson_steps: int = 1500,
    noise: float = 0.8,
    seed: int = 0,
) -> tuple[LlamaForCausalLM, dict[str, float]]:
    """
    Trains the language model from nothing.

    First the easy lesson, which fades into the full mix of questions, then image slots that are ever less clean. Some
    kinds of questions are learned late, all at once; the second part asks those most that still fail.

    Args:
        tokenizer (`PreTrainedTokenizerFast`): The model's own tokenizer.
        steps (`int`, *optional*, defaults to 1300): Optimizer steps of the first part.
        more_steps (`int`, *optional*, defaults to 500): Optimizer steps of the second.
        lesson_steps (`int`, *optional*, defaults to 1500): At most so many for the easy lesson before (it took 110).
        noise (`float`, *optional*, defaults to 0.8): How unlike clean words the image slots become (0 to 1).
        seed (`int`, *optional*, defaults to 0): Seed of weights and rows.

    Returns:
        `tuple`: the model, and the accuracy of the letter on fresh rows.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(text_config(len(tokenizer)))
    structured_start(model)
    teach_all(model, tokenizer, steps, more_steps, lesson_steps, noise, seed)
    return model, score_text(model, tokenizer, noise)


def teach_all(model, tokenizer, steps: int, more_steps: int, lesson_steps: int, noise: float, seed: int):
    """The easy lesson, then noisier and noisier image slots, then the harder of several questions: [`train_text`]."""
    teach(
        model, tokenizer, lesson_steps, 2e-3, candidates=1, seed=seed + 2, until=0.93,
        lesson=lambda step: 1.0, noise=lambda step: 0.0,
    )  # fmt: skip
    teach(
        model, tokenizer, steps, 2e-3, candidates=1, seed=seed,
        lesson=lambda step: max(0.15, 0.7 - step / 400),
        noise=lambda step: noise * min(1.0, max(0.0, step / steps - 0.2) / 0.4),
    )  # fmt: skip
    teach(
        model, tokenizer, more_steps, 1e-3, candidates=4, seed=seed + 1,
        lesson=lambda step: 0.0, noise=lambda step: noise,
    )  # fmt: skip


def letters_right(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns which rows got their letter right, and which rows have image slots."""
    index = torch.arange(len(logits))
    guess = logits[index, batch["letter"] - 1].argmax(-1)
    return guess == batch["input_ids"][index, batch["letter"]], batch["has_image"]


@torch.no_grad()
def score_text(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, noise: float = 0.8) -> dict[str, float]:
    """Accuracy of the letter on 1,024 fresh rows without the easy lesson."""
    rows, generator = Rows(tokenizer, seed=12345), torch.Generator().manual_seed(1)
    seen = []
    for _ in range(16):
        batch = rows.batch(64, 0.0, candidates=1)
        logits = model(inputs_embeds=embed(model, batch, noise, generator), use_cache=False).logits
        seen.append(letters_right(logits, batch))
    right, image = (torch.cat([part[i] for part in seen]) for i in (0, 1))
    return {
        "text": round(right[~image].float().mean().item(), 4),
        "slots": round(right[image].float().mean().item(), 4),
    }
