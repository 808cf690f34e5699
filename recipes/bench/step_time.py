"""
Time of a training step, forward and backward without the optimizer, of LaVIN with MMA beside

- the frozen base: the same towers and projector without an adapter, the vision tower forward only, then forward and
  backward of the plain language model down to its input embeddings: what no method that trains anything in front of
  the language model can avoid;
- PEFT LoRA, r=8 on q and v, of the same language model on the same inputs.

These three run a bare loop with the models' own forward and loss: logits at every position, loss on the answer's
tokens. `base_trl`, `lora_trl` and `mma_trl` are the same under the head that TRL's SFT puts on a model, which is how
`trl sft` trains. `mma_labelled` is LaVIN in a loop of one's own that asks for logits only where there is a label
(`logits_to_keep`), which gives the same loss and gradients; `lora_labelled` is LoRA in such a loop.

LaVIN's step has two things that the base's has not and that no adapter code can make cheaper: the backward of the
vision tower, whose adapters are trained too, and the routing pass. `base_vision` is the base with the first of them.
"""

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model

from ..machine import machine
from .models import Size, adapted_lavin, describe, embed, frozen_lavin, language_model, make_batch
from .timing import interleave, summary


try:
    from trl.trainer.utils import add_fused_lm_head
except ImportError:  # no TRL, or one before 1.16: what runs under its head is left out
    add_fused_lm_head = None


NAME = "step_time"
GOALS = [
    ("mma_trl", "base_trl", "at most 1.05"),
    ("mma_trl", "lora_trl", "at most 0.95"),
    ("mma", "base", None),
    ("mma", "lora", None),
    ("mma", "base_vision", None),
    ("mma_labelled", "base", None),
    ("mma_labelled", "lora", None),
    ("mma_labelled", "lora_labelled", None),
    ("lora", "base", None),
]
ROUNDS = 15
MAX_BATCHES = 8  # different batches, taken in turn


def make_rivals(size: Size, seed: int = 0, lora_dropout: float = 0.0, batches: list[dict] | None = None) -> dict:
    """One function per rival; each runs one training step on the batch of a round, of `batches` or of its own."""
    frozen = frozen_lavin(size, seed)
    base = language_model(frozen).train()
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"], lora_dropout=lora_dropout, task_type="CAUSAL_LM")
    lora = get_peft_model(language_model(frozen), lora).train()
    mma = adapted_lavin(size, frozen).train()
    if batches is None:
        batches = [make_batch(size, frozen.config, seed=1000 * seed + number) for number in range(MAX_BATCHES)]

    def own_loss(model, inputs):
        return model(use_cache=False, **inputs).loss

    def step(model, inputs, loss=own_loss):
        for parameter in model.parameters():
            parameter.grad = None
        loss(model, inputs).backward()

    def on_embeds(model, batch, requires_grad, loss=own_loss):
        with torch.no_grad():
            embeds = embed(frozen, batch)
        embeds.requires_grad_(requires_grad)
        given = {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"], "labels": batch["labels"]}
        step(model, given, loss)

    def with_vision(batch):
        pixels = batch["pixel_values"].clone().requires_grad_()
        embeds = embed(frozen, {**batch, "pixel_values": pixels})
        embeds = embeds if embeds.requires_grad else embeds.requires_grad_()  # a batch without images
        step(base, {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"], "labels": batch["labels"]})

    def lora_labelled(batch):
        for parameter in lora.parameters():
            parameter.grad = None
        with torch.no_grad():
            embeds = embed(frozen, batch)
        plain, targets = lora.get_base_model(), F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
        hidden = plain.model(inputs_embeds=embeds, attention_mask=batch["attention_mask"], use_cache=False)
        logits = plain.lm_head(hidden.last_hidden_state[targets != -100])
        F.cross_entropy(logits.float(), targets[targets != -100]).backward()

    steps = {
        "base": lambda batch: on_embeds(base, batch, True),
        "base_vision": with_vision,
        "lora": lambda batch: on_embeds(lora, batch, False),
        "lora_labelled": lora_labelled,
        "mma": lambda batch: step(mma, batch),
        "mma_labelled": lambda batch: step(mma, batch, labelled_loss),
    }
    if add_fused_lm_head is not None:
        for model in (base, lora.get_base_model(), mma.get_base_model()):  # beside its own head, which it keeps
            add_trl_head(model)
        steps["base_trl"] = lambda batch: on_embeds(base, batch, True, trl_loss)
        steps["lora_trl"] = lambda batch: on_embeds(lora, batch, False, trl_loss)
        steps["mma_trl"] = lambda batch: step(mma, batch, trl_loss)
    return {name: lambda number, run=run: run(batches[number % len(batches)]) for name, run in steps.items()}


def labelled_loss(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss of `model(**batch)`, with logits only at the positions that have a label."""
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    return model(use_cache=False, logits_to_keep=targets != -100, **batch).loss


def add_trl_head(model):
    """Gives a model what TRL's SFT gives it: `model(..., fused_lm_head=True)`."""
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))


def trl_loss(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss as TRL's SFT computes it, of a model that has TRL's head."""
    outputs = model(fused_lm_head=True, **batch)
    return -outputs.log_probs.sum() / outputs.label_mask.sum()


def run(size: Size, rounds: int, seed: int = 0, lora_dropout: float = 0.0) -> dict:
    """
    Measures it.

    Returns:
        `dict`: `results` with seconds and ratios, and what they were measured with.
    """
    torch.manual_seed(seed)
    seconds = interleave(make_rivals(size, seed, lora_dropout), rounds)
    return {
        "title": "Training step, forward + backward (a bare loop)",
        "name": NAME,
        "machine": machine(),
        "rounds": rounds,
        "size": vars(size),
        "lora_dropout": lora_dropout,
        "notes": [
            f"{describe(size)}, patch {size.patch_size}",
            f"{size.batch_size} rows, half of them with an image, prompt about {size.prompt_tokens} and answer about "
            f"{size.answer_tokens} tokens, padded to the longest; float32; LoRA dropout {lora_dropout}",
        ],
        "results": {"training step": summary(seconds, GOALS)},
    }
