"""
Samples per second of training (forward, backward, AdamW), beside two things that a user would have instead:

- `llava`: transformers' LLaVA of the same two towers with PEFT LoRA r=8 on the language model's q and v, all else
  frozen, which is the cheapest way to train it. LLaVA puts one token per patch into the sequence, that is its design;
- `recipe_2023`: what LaVIN's own recipe of 2023 cost, with our model otherwise: every row padded to 512 (longer ones
  cut), the vision tower run on every row, logits at every position.

Both are trained in three ways: `lavin_own` and `llava_own` by `model(**batch).loss`; `lavin` and `llava` with logits
at labelled positions only, in a loop of one's own; `lavin_trl` and `llava_trl` by the head of TRL's SFT, which
computes log-probabilities, entropy and accuracy (without Triton at every position). All are bare loops: no data is
read, nothing is logged or saved. LaVIN pads each batch to its longest row and runs the vision tower on the images
that there are.
"""

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import LlavaConfig, LlavaForConditionalGeneration

from ..machine import machine
from .models import Size, adapted_lavin, describe, frozen_lavin, make_batch, pad_right, rows_of
from .step_time import add_fused_lm_head, add_trl_head, labelled_loss, trl_loss
from .timing import interleave, summary


NAME = "train_rate"
ROUNDS = 5
GOALS = [
    ("llava_trl", "lavin_trl", "at least 2.00"),
    ("llava_own", "lavin_own", "at least 2.00"),
    ("llava", "lavin", "at least 2.00"),
    ("llava_trl", "lavin", None),
    ("recipe_2023", "lavin", "at least 4.00"),
    ("recipe_2023", "lavin_own", None),
]
PADDED = 512
LLAVA_IMAGE_ID = 1  # no text has it: texts draw from 3 on


def llava(size: Size, frozen, lora_dropout: float = 0.0):
    """transformers' LLaVA on the weights of a frozen LaVIN's towers, the very same memory, with LoRA."""
    config = LlavaConfig(
        vision_config=frozen.config.vision_config,
        text_config=frozen.config.text_config,
        image_token_index=LLAVA_IMAGE_ID,
        image_seq_length=(size.image_size // size.patch_size) ** 2,
    )
    model = LlavaForConditionalGeneration(config)
    own = ("multi_modal_projector", "modality_embedding")
    towers = {name: value for name, value in frozen.state_dict().items() if not any(part in name for part in own)}
    missing, unexpected = model.load_state_dict(towers, strict=False, assign=True)
    if unexpected or any("multi_modal_projector" not in name for name in missing):
        raise RuntimeError(f"LLaVA's towers are named differently: missing {missing}, unexpected {unexpected}")
    # A regex: q and v of the language model only. By names alone the vision tower's would be trained as well.
    lora = LoraConfig(r=8, target_modules=r".*language_model.*\.(q|v)_proj", lora_dropout=lora_dropout)
    return get_peft_model(model, lora)


def llava_batch(batch: dict[str, torch.Tensor], image_token_id: int, patches: int) -> dict[str, torch.Tensor]:
    """The same rows with LLaVA's image tokens, one per patch, in the place of ours."""
    rows = []
    for ids, labels in rows_of(batch):
        text = ids != image_token_id
        if not text.all():
            image = torch.full((patches,), LLAVA_IMAGE_ID)
            ids, labels = torch.cat([image, ids[text]]), torch.cat([torch.full_like(image, -100), labels[text]])
        rows.append((ids, labels))
    return {**pad_right(rows), "pixel_values": batch["pixel_values"]}


def recipe_batch(batch: dict[str, torch.Tensor], image_token_id: int) -> dict[str, torch.Tensor]:
    """The same rows at length 512, with an empty image for each row that has none."""
    padded = pad_right([(ids[:PADDED], labels[:PADDED]) for ids, labels in rows_of(batch)], PADDED)
    has_image = (padded["input_ids"] == image_token_id).any(dim=1)
    pixels = torch.zeros(len(has_image), *batch["pixel_values"].shape[1:])
    pixels[has_image] = batch["pixel_values"]
    return {**padded, "pixel_values": pixels}


def recipe_loss(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss by the recipe of 2023: all images through the tower, logits and their gradients at all positions."""
    base = model.get_base_model()
    has_image = (batch["input_ids"] == base.config.image_token_id).any(dim=1)
    features = base.get_image_features(batch["pixel_values"], return_dict=True)
    features.pooler_output = features.pooler_output[has_image]
    inputs = {name: value for name, value in batch.items() if name != "pixel_values"}
    targets = F.pad(inputs.pop("labels")[:, 1:], (0, 1), value=-100)
    logits = model(use_cache=False, mm_encoder_outputs={"image": features}, **inputs).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def llava_labelled_loss(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """LLaVA's loss with logits at labelled positions only."""
    inputs, base = dict(batch), model.get_base_model()
    targets = F.pad(inputs.pop("labels")[:, 1:], (0, 1), value=-100)
    hidden = base.model(use_cache=False, **inputs).last_hidden_state
    return F.cross_entropy(base.lm_head(hidden[targets != -100]).float(), targets[targets != -100])


def make_rivals(size: Size, batches: list[dict], seed: int = 0, lora_dropout: float = 0.0) -> dict:
    """One function per rival; each runs one training step on the rows of a round."""
    frozen = frozen_lavin(size, seed)
    image_id, patches = frozen.config.image_token_id, (size.image_size // size.patch_size) ** 2
    mma, rival = adapted_lavin(size, frozen).train(), llava(size, frozen, lora_dropout).train()

    def optimizer_of(model):
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    optimizers = {model: optimizer_of(model) for model in (mma, rival)}

    def trainer(model, loss, inputs):
        def run(number):
            loss(model, inputs[number % len(inputs)]).backward()
            optimizers[model].step()
            optimizers[model].zero_grad()

        return run

    def own_loss(model, batch):
        return model(use_cache=False, **batch).loss

    llava_batches = [llava_batch(batch, image_id, patches) for batch in batches]
    steps = {
        "lavin": trainer(mma, labelled_loss, batches),
        "lavin_own": trainer(mma, own_loss, batches),
        "llava": trainer(rival, llava_labelled_loss, llava_batches),
        "llava_own": trainer(rival, own_loss, llava_batches),
        "recipe_2023": trainer(mma, recipe_loss, [recipe_batch(batch, image_id) for batch in batches]),
    }
    if add_fused_lm_head is not None:
        for model in (mma, rival):  # beside their own, which they keep
            add_trl_head(model.get_base_model())
        steps["lavin_trl"] = trainer(mma, trl_loss, batches)
        steps["llava_trl"] = trainer(rival, trl_loss, llava_batches)
    return steps


def run(size: Size, rounds: int, seed: int = 0, lora_dropout: float = 0.0) -> dict:
    """
    Measures it at the size's patches and at small ones (ViT-L/14's, where the image can be cut so).

    Returns:
        `dict`: `results` with seconds, samples per second and ratios, and what they were measured with.
    """
    results, notes = {}, []
    for patch in dict.fromkeys([size.patch_size, 14 if size.image_size % 14 == 0 else size.patch_size // 2]):
        torch.manual_seed(seed)
        one = Size(**{**vars(size), "patch_size": patch})
        config = frozen_lavin(one, seed).config
        batches = [make_batch(one, config, seed=1000 * seed + number) for number in range(rounds)]
        seconds = interleave(make_rivals(one, batches, seed, lora_dropout), rounds)
        case = summary(seconds, [goal for goal in GOALS if {*goal[:2]} <= seconds.keys()])
        rates = {name: one.batch_size / value for name, value in case["seconds"].items()}
        results[f"patch {patch}"] = {"samples_per_second": rates, **case}
        patches = (one.image_size // patch) ** 2
        padded = [llava_batch(batch, config.image_token_id, patches)["input_ids"].shape[1] for batch in batches]
        ours = [batch["input_ids"].shape[1] for batch in batches]
        notes.append(
            f"patch {patch}: an image is {config.num_image_tokens} tokens for LaVIN and {patches} for LLaVA; a padded "
            f"row {sum(ours) / rounds:.0f} and {sum(padded) / rounds:.0f}, {PADDED} by the recipe of 2023"
        )
    return {
        "title": "Training, samples per second (bare loops: forward, backward, AdamW)",
        "name": NAME,
        "machine": machine(),
        "rounds": rounds,
        "size": vars(size),
        "lora_dropout": lora_dropout,
        "notes": [
            describe(size),
            f"{size.batch_size} rows, half of them with an image, prompt about {size.prompt_tokens} and answer about "
            f"{size.answer_tokens} tokens; float32; a ratio is how many times as long as LaVIN the other one takes",
            *notes,
        ],
        "results": results,
    }
