"""Padding in training: on the right it needs no mask, and what is learned does not depend on that."""

import pytest
import torch
from conftest import TEXTS, batch, tiny_peft


def step(
    model, inputs, monkeypatch, ask: bool = True, labels=None
) -> tuple[list, torch.Tensor, dict[str, torch.Tensor]]:
    """Masks that the language model got, the loss, and the gradients."""
    lavin = model.get_base_model().model
    masks, forward = [], lavin.language_model.forward

    def seen(attention_mask=None, **kwargs):
        masks.append(attention_mask)
        return forward(attention_mask=attention_mask, **kwargs)

    hidden = (inputs["attention_mask"] == 0) | (inputs["input_ids"] == model.config.image_token_id)
    model.zero_grad()
    with monkeypatch.context() as patch:
        patch.setattr(lavin.language_model, "forward", seen)
        if not ask:
            patch.setattr(type(model.get_base_model()), "_needed_mask", lambda self, mask, labels: mask)
        labels = inputs["input_ids"].masked_fill(hidden, -100) if labels is None else labels
        loss = model(**inputs, labels=labels).loss
    loss.backward()
    return masks[-1], loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("text", TEXTS)
def test_what_is_learned_is_the_same_without_a_mask(text, monkeypatch):
    model = tiny_peft(text, mma={"dropout": 0.0}).train()
    inputs = batch(model.config, (1, 0, 2), side="right")
    mask, loss, found = step(model, inputs, monkeypatch)
    kept, expected, gradients = step(model, inputs, monkeypatch, ask=False)
    assert mask is None and kept is not None
    assert torch.allclose(loss, expected, rtol=1e-6) and found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert (found[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max() + 1e-7, name


def test_where_the_mask_stays(monkeypatch):
    model = tiny_peft()
    right, left = (batch(model.config, (1, 0), side=side) for side in ("right", "left"))
    assert step(model.train(), left, monkeypatch)[0] is not None
    holes = {**right, "attention_mask": right["attention_mask"].clone()}
    holes["attention_mask"][0, 3] = 0
    assert step(model, holes, monkeypatch)[0] is not None
    labelled = right["input_ids"].masked_fill(right["input_ids"] == model.config.image_token_id, -100)
    assert step(model, right, monkeypatch, labels=labelled)[0] is not None  # a padding token is to be predicted
    positions = torch.arange(right["input_ids"].shape[1]).expand_as(right["input_ids"])
    assert step(model, {**right, "position_ids": positions}, monkeypatch)[0] is not None
    assert step(model.eval(), right, monkeypatch)[0] is not None
    model.train().get_base_model().set_attn_implementation("eager")
    assert step(model, right, monkeypatch)[0] is not None
