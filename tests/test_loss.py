"""The loss of a frozen head: transformers' own in value and gradient, at less cost."""

import pytest
import torch
from conftest import batch, tiny_lavin, tiny_peft
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from lavin.loss_lavin import FrozenHeadLoss, frozen_head, frozen_head_loss, next_labels


@pytest.fixture
def model():
    return tiny_peft(mma={"dropout": 0.0}).train()


@pytest.fixture
def calls(monkeypatch):
    """Counts how often the loss took the short way."""
    count, apply = [], FrozenHeadLoss.apply
    monkeypatch.setattr(FrozenHeadLoss, "apply", lambda *args: count.append(1) or apply(*args))
    return count


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


def by_logits(model, **inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The same by transformers' loss, through the logits."""
    model.zero_grad()
    given = {name: inputs.pop(name) for name in ("labels", "num_items_in_batch") if name in inputs}
    loss = ForCausalLMLoss(model(**inputs).logits, vocab_size=model.config.text_config.vocab_size, **given)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    assert torch.allclose(found[0], expected[0], rtol=1e-5)
    assert found[1].keys() == expected[1].keys() and len(found[1]) > 10
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).abs().max() <= 1e-5 * gradient.abs().max() + 1e-7, name


@pytest.mark.parametrize("items", [None, 17, torch.tensor(17)], ids=["mean", "int", "tensor"])
@pytest.mark.parametrize("rows_at_once", [1, 3, 10_000])
def test_loss_and_gradients_are_those_of_the_logits(model, calls, monkeypatch, items, rows_at_once):
    monkeypatch.setattr("lavin.loss_lavin.CHUNK_NUMEL", rows_at_once * model.config.text_config.vocab_size)
    inputs = labelled(model) | ({} if items is None else {"num_items_in_batch": items})
    found = step(model, **inputs)
    assert len(calls) == 1
    assert_same(found, by_logits(model, **inputs))


def test_accumulated_scaled_and_on_logits_of_ones_own(model):
    """Two losses in one backward, a factor on one of them, and the logits still differentiable beside."""
    inputs, other = labelled(model), labelled(model, (0, 1))
    model.zero_grad()
    first, second = model(**inputs), model(**other)
    (3 * first.loss + second.loss + first.logits.mean()).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    first, second = model(**inputs), model(**other)
    vocab = model.config.text_config.vocab_size
    loss = 3 * ForCausalLMLoss(first.logits, inputs["labels"], vocab)
    (loss + ForCausalLMLoss(second.logits, other["labels"], vocab) + first.logits.mean()).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert_same((torch.ones(()), found), (torch.ones(()), expected))


def test_nothing_of_the_logits_size_is_kept(model):
    """What the backward keeps of the vocabulary's width is nothing: the frozen head needs its weight alone."""
    inputs = labelled(model)
    kept, vocab = [], model.config.text_config.vocab_size
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        model(**inputs)
        before = len([shape for shape in kept if shape[-1:] == (vocab,)])
        loss = model(**inputs).loss
    assert len([shape for shape in kept if shape[-1:] == (vocab,)]) == 2 * before
    loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_float32(dtype):
    """Values at 1e-3 of each other's size; gradients no further from float32's than by the logits."""
    torch.manual_seed(0)
    head = nn.Linear(64, 501, bias=False).requires_grad_(False)
    hidden, labels = torch.randn(2, 30, 64), torch.randint(0, 501, (2, 30))
    labels[:, :10] = -100
    targets = next_labels(labels)

    def gradient(loss, dtype):
        x = hidden.clone().to(dtype).requires_grad_()
        value = loss(x, nn.functional.linear(x, head.weight.to(dtype)))
        (value * 1024).backward()  # as a gradient scaler does
        return value.detach(), x.grad.float() / 1024

    class Half:
        weight = head.weight

    by_chunks = lambda x, logits: frozen_head_loss(x, logits, Half, targets)  # noqa: E731
    by_logits = lambda x, logits: ForCausalLMLoss(logits, labels, 501)  # noqa: E731
    true, exact = gradient(by_logits, torch.float32)
    (value, found), (other, plain) = gradient(by_chunks, dtype), gradient(by_logits, dtype)
    assert abs(value - other) < 1e-6 and abs(value - true) < 1e-2
    assert (found - exact).norm() <= 1.2 * (plain - exact).norm()


def test_in_evaluation_there_is_no_gradient(model, calls):
    inputs = labelled(model)
    with torch.no_grad():
        out = model.eval()(**inputs)
    expected = ForCausalLMLoss(out.logits, inputs["labels"], model.config.text_config.vocab_size)
    assert calls and not out.loss.requires_grad and torch.allclose(out.loss, expected)


def test_without_a_label(model):
    """As transformers' loss: nothing over nothing, and nothing over a trainer's count, both without gradient."""
    inputs = labelled(model)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    for items, value in ((None, torch.nan), (0, torch.nan), (torch.tensor(0), torch.nan), (5, 0.0)):
        loss, gradients = step(model, **inputs, **({} if items is None else {"num_items_in_batch": items}))
        assert torch.equal(loss.nan_to_num(7), torch.tensor(value).nan_to_num(7))
        assert len(gradients) > 10 and all(not gradient.any() for gradient in gradients.values())


def test_second_derivatives_are_refused(model):
    """A penalty on the gradient would miss most of its own; on the logits it is whole."""
    inputs = labelled(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(model(**inputs).loss, trained, create_graph=True, allow_unused=True)


@pytest.mark.parametrize("keep", [3, torch.tensor([4, 7]), torch.tensor([[5, 6], [8, 5]]), "mask"])
def test_loss_at_the_positions_kept(model, keep):
    """Labels and `logits_to_keep` together: the loss over what is kept, on either way."""
    inputs = labelled(model)
    targets = next_labels(inputs["labels"])
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
    model.get_base_model().lm_head.register_forward_hook(lambda *args: None)
    assert_same(step(model, **inputs, logits_to_keep=keep), found)


def test_only_a_plain_frozen_head_takes_the_short_way(model, calls):
    inputs = labelled(model)
    base = model.get_base_model()

    def taken() -> bool:
        calls.clear()
        model(**inputs).loss.backward()
        return bool(calls)

    assert taken()
    handle = base.lm_head.register_forward_hook(lambda module, args, output: output * 2)
    assert not taken()
    handle.remove()
    base.lm_head.weight.requires_grad_(True)
    assert not taken()
    base.lm_head.weight.requires_grad_(False)
    handle = base.lm_head.register_full_backward_hook(lambda *args: None)
    assert not taken()
    handle.remove()
    base.loss_function = lambda logits, labels, vocab_size: logits.mean()  # as it is called without more to say
    assert not taken()
    base.loss_function = ForCausalLMLoss
    assert taken()
    base.lm_head.weight.ds_id = 7  # ZeRO-3: partitioned, gathered only inside the head
    assert not frozen_head(base.lm_head, ForCausalLMLoss)


def test_an_adapter_on_the_head_is_trained(calls):
    model = get_peft_model(tiny_lavin(adapter=False), LoraConfig(target_modules=["lm_head", "q_proj"], r=2)).train()
    _, gradients = step(model, **labelled(model))
    assert not calls and any("lm_head" in name for name in gradients)
