"""The loss of `forward`: transformers' own, over the positions that are kept."""

import pytest
import torch
from conftest import batch, tiny_peft
from transformers.loss.loss_utils import ForCausalLMLoss


@pytest.fixture
def model():
    return tiny_peft(mma={"dropout": 0.0}).train()


def labelled(model, images=(1, 0)) -> dict[str, torch.Tensor]:
    inputs = batch(model.config, images, side="right")
    hidden = (inputs["attention_mask"] == 0) | (inputs["input_ids"] == model.config.image_token_id)
    labels = inputs["input_ids"].masked_fill(hidden, -100)
    labels[:, :4] = -100
    return {**inputs, "labels": labels}


def step(model, **inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss, and the gradients of all that is trained."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    assert torch.allclose(found[0], expected[0], rtol=1e-5)
    assert found[1].keys() == expected[1].keys() and len(found[1]) > 10
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).abs().max() <= 1e-5 * gradient.abs().max() + 1e-7, name


@pytest.mark.parametrize("items", [None, 17, torch.tensor(17)], ids=["mean", "int", "tensor"])
def test_loss_is_that_of_the_logits(model, items):
    inputs = labelled(model)
    given = {} if items is None else {"num_items_in_batch": items}
    out = model(**inputs, **given)
    vocab = model.config.text_config.vocab_size
    assert torch.equal(out.loss, ForCausalLMLoss(out.logits, inputs["labels"], vocab, **given))


def test_image_tokens_are_no_labels(model):
    inputs = labelled(model)
    place = inputs["input_ids"] == model.config.image_token_id
    assert place.any()
    more = inputs["labels"].masked_fill(place, model.config.image_token_id)
    assert torch.equal(model(**{**inputs, "labels": more}).loss, model(**inputs).loss)


@pytest.mark.parametrize("keep", [3, torch.tensor([4, 7]), torch.tensor([[5, 6], [8, 5]]), "mask"])
def test_loss_at_the_positions_kept(model, keep):
    """Labels and `logits_to_keep` together: the loss over what is kept, on either way."""
    inputs = labelled(model)
    targets = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]
    keep = targets != -100 if isinstance(keep, str) else keep
    kept = torch.zeros_like(targets, dtype=torch.bool)
    if isinstance(keep, int):
        kept[:, -keep:] = True
    elif keep.dtype == torch.bool:
        kept = keep
    elif keep.ndim == 1:
        kept[:, keep] = True
    else:
        kept.scatter_(1, keep, True)
    found = step(model, **inputs, logits_to_keep=keep)
    shifted = targets.masked_fill(~kept, -100)
    assert_same(found, step(model, **inputs, shift_labels=shifted))
