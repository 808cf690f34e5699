"""Chooses an option by the logits of the letters after "The answer is", instead of by generating."""

from collections.abc import Iterator

import torch

from ..data.scienceqa import ANSWER_START, LETTERS
from .answers import run_batches


def letter_tokens(tokenizer, letters: str = LETTERS) -> tuple[list[int], list[int]]:
    """
    Where the letters differ: the tokens that "The answer is X." begins with whatever X is, and the next token of each.

    Returns:
        `tuple(list[int], list[int])`: the common beginning's ids, and one id per letter.

    Raises:
        `ValueError`: if two letters have the same next token.
    """
    ids = tokenizer([f"{ANSWER_START} {letter}." for letter in letters], add_special_tokens=False).input_ids
    same = 0
    while len({row[same] for row in ids}) == 1:
        same += 1
    tokens = [row[same] for row in ids]
    if len(set(tokens)) != len(letters):
        raise ValueError(
            f"This tokenizer does not tell the letters {letters} apart by one token: use the mode that generates."
        )
    return ids[0][:same], tokens


@torch.inference_mode()
def letter_batches(
    model, processor, prompts: list, images: list[list], choices: list[int], batch_size: int
) -> Iterator[tuple[list[int], list[list[float]]]]:
    """
    Scores the letters of each question's choices in one forward per batch.

    Args:
        model ([`LavinForConditionalGeneration`]): The model, in eval mode.
        processor ([`LavinProcessor`]): Its processor.
        prompts (`list[str]` or `list[list[dict]]`): Questions, as for [`~answers.answer`].
        images (`list[list]`): The images of each.
        choices (`list[int]`): How many choices each has.
        batch_size (`int`): Questions at once.

    Yields:
        `tuple(list[int], list[list[float]])`: the rows of a batch, and for each the log-probabilities of its letters.
    """
    letters = LETTERS[: max([2, *choices])]  # one alone differs from nothing
    start, tokens = letter_tokens(processor.tokenizer, letters)

    def run(rows, inputs):
        inputs = dict(inputs)
        added = torch.tensor([start] * len(rows), device=model.device)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(added)], dim=1)
        inputs.update(
            input_ids=torch.cat([inputs["input_ids"], added], dim=1),
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
        )
        logits = model(**inputs, logits_to_keep=1).logits[:, -1].float()
        scores = logits.log_softmax(-1)[:, tokens].tolist()
        return [row[: choices[i]] for i, row in zip(rows, scores, strict=True)]

    yield from run_batches(model, processor, prompts, images, batch_size, run)
