"""LaVIN as a model of lmms-eval, on the same loading, batching and greedy decoding as `lavin eval`."""

import json

from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from ..evaluate.answers import generate_batches
from ..load import load_model


CHUNK = 32  # batches whose images are in memory at once, and among which rows are sorted by length


class Lavin(lmms):
    """
    `python -m lmms_eval --model lavin --model_args pretrained=DIR`.

    Args:
        pretrained (`str`): A LaVIN folder, or its name on the Hub.
        batch_size (`int` or `str`, *optional*, defaults to 1): Rows at once; lmms-eval's option `--batch_size`.
        device (`str`, *optional*): By default the GPU where there is one; each process of `accelerate launch` its own.
        dtype (`str`, *optional*): Of the frozen towers: by default bfloat16 on a GPU and float32 on a CPU.

    Raises:
        `OSError`, `ValueError`: if the model cannot be loaded or the batch size is no number.
    """

    is_simple = True  # lmms-eval gives text and images apart; the images stand before the text, as LaVIN was trained

    def __init__(
        self, pretrained: str, batch_size: int | str = 1, device: str | None = None, dtype: str | None = None
    ):
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"`batch_size` must be a number, got {batch_size!r}.")
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator(cpu=str(device).startswith("cpu"))
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self.world_size > 1:
            device = str(self.accelerator.device)
        self.model, self.processor = load_model(pretrained, device, dtype)
        self.device = self.model.device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """
        Greedy answers. `max_new_tokens` (64 by default) and `until` (the answer is cut before the first of these
        strings) are taken from the task.

        Raises:
            `ValueError`: if the task wants to sample or to search with beams, or shows something other than images.
        """
        groups: dict[tuple[int, tuple], list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(read_settings(request.args[1]), []).append(i)
        answers = [""] * len(requests)
        with tqdm(total=len(requests), desc="Answers", unit="question", disable=self.rank != 0) as bar:
            for (max_new_tokens, until), places in groups.items():
                for start in range(0, len(places), CHUNK * self.batch_size):
                    chunk = places[start : start + CHUNK * self.batch_size]
                    prompts = [requests[i].args[0] for i in chunk]
                    images = [self.images(*requests[i].args[2:6]) for i in chunk]
                    for rows, texts in generate_batches(
                        self.model, self.processor, prompts, images, self.batch_size, max_new_tokens
                    ):
                        for row, text in zip(rows, texts, strict=True):
                            answers[chunk[row]] = cut(text, until)
                        bar.update(len(rows))
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not there: lmms-eval 0.7.3 makes text of the scores that a model returns, and its own metrics fail on it."""
        raise NotImplementedError(
            "lmms-eval 0.7.3 cannot score by likelihood: it makes text of what a model returns. Take a task that "
            "generates, or `lavin eval scienceqa --mode letters`."
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not there: LaVIN is trained on single turns."""
        raise NotImplementedError("LaVIN answers single turns: this task asks several rounds.")

    def images(self, doc_to_visual, doc_id: int, task: str, split: str) -> list[Image.Image]:
        """The images of a request."""
        visuals = doc_to_visual(self.task_dict[task][split][doc_id]) if doc_to_visual is not None else None
        visuals = [visual for visual in visuals or [] if visual is not None]
        if others := {type(visual).__name__ for visual in visuals if not isinstance(visual, Image.Image)}:
            raise ValueError(f"LaVIN reads images only; the task {task} shows {', '.join(sorted(others))}.")
        return visuals


def read_settings(generation: dict) -> tuple[int, tuple[str, ...]]:
    """`max_new_tokens` and `until` of a task's generation settings; raises `ValueError` where they are not greedy."""
    if (
        generation.get("do_sample")
        or (generation.get("temperature") or 0) > 0
        or (generation.get("num_beams") or 1) > 1
    ):
        raise ValueError(
            f"LaVIN answers greedily here; the task wants {json.dumps(generation)}. Add --gen_kwargs "
            "temperature=0,do_sample=False,num_beams=1."
        )
    until = generation.get("until") or []
    return int(generation.get("max_new_tokens") or 64), (until,) if isinstance(until, str) else tuple(until)


def cut(text: str, until: tuple[str, ...]) -> str:
    """The text before the first of some strings."""
    return text[: min((text.find(end) for end in until if end and end in text), default=len(text))]
