"""
The next-token loss of a frozen head, whose backward costs nothing where there is no label.

A framework's loss keeps log-probabilities of every position for the backward and sends a gradient of every logit
through the head, most of it zeros: prompts, image tokens and padding have no label. With a frozen head all that is
ever needed is the gradient of the head's input at labelled positions, so it is computed here at once with the loss,
some rows at a time, and nothing as large as the logits is kept or made a second time.
"""

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss


# Numbers in one step's scores (32 MB in float32): few enough to stay in reach, enough rows for a matrix product.
CHUNK_NUMEL = 2**23


class FrozenHeadLoss(torch.autograd.Function):
    """Sum of the cross-entropy over the targets that count, `(positions,)`, differentiable in the head's input."""

    @staticmethod
    def forward(ctx, hidden_states, logits, weight, targets, ignore_index):
        wants_gradient = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(hidden_states) if wants_gradient else None
        total = torch.zeros((), device=logits.device)
        counted = (targets != ignore_index).nonzero().squeeze(1)
        for rows in counted.split(max(1, CHUNK_NUMEL // logits.shape[1])):
            scores = logits[rows].float()
            target = targets[rows].unsqueeze(1)
            top, wanted = scores.amax(dim=1, keepdim=True), scores.gather(1, target)
            norm = scores.sub_(top).exp_().sum(dim=1, keepdim=True)
            total += (norm.log() + top - wanted).sum()
            if wants_gradient:
                scores.div_(norm).scatter_add_(1, target, torch.full_like(norm, -1))
                gradient[rows.to(gradient.device)] = (scores.to(logits.dtype) @ weight.to(logits.dtype)).to(gradient)
        ctx.save_for_backward(gradient)
        ctx.any_counted = len(counted) > 0
        return total

    @staticmethod
    def backward(ctx, grad_output):
        if torch.is_grad_enabled():
            raise RuntimeError("The loss of a frozen head has no second derivative: take your own, on the logits.")
        (gradient,) = ctx.saved_tensors
        # Without a label the mean is 0 / 0, and zeros times its infinite factor would be NaN.
        gradient = (gradient * grad_output).to(gradient) if ctx.any_counted else gradient
        return gradient, None, None, None, None


def frozen_head(head: nn.Module, loss_function) -> bool:
    """Whether the head is a plain frozen map with its weight at hand, and the loss the usual one."""
    return (
        loss_function is ForCausalLMLoss
        and not torch.compiler.is_compiling()
        and type(head) is nn.Linear
        and type(head.weight) is nn.Parameter  # not quantised, not sharded
        and not (head.weight.requires_grad or head.weight.is_meta or hasattr(head.weight, "ds_id"))
        and not (head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head))
        and not (head._backward_hooks or head._backward_pre_hooks)
    )


def next_labels(
    labels: torch.Tensor, shift_labels: torch.Tensor | None = None, ignore_index: int = -100, **kwargs
) -> torch.Tensor:
    """What each position predicts, in the shape of `labels`: the label after it, or as stated."""
    return nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:] if shift_labels is None else shift_labels


def frozen_head_loss(
    hidden_states: torch.Tensor,
    logits: torch.Tensor,
    head: nn.Linear,
    shift_labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    **kwargs,
) -> torch.Tensor:
    """
    transformers' `ForCausalLMLoss` where [`frozen_head`] holds: the same loss and the same gradient of what is below
    the head. The logits themselves get no gradient from it.

    Args:
        hidden_states (`torch.Tensor` of shape `(..., hidden_size)`): The head's input.
        logits (`torch.Tensor` of shape `(..., vocab_size)`): The head's output.
        head (`nn.Linear`): The head.
        shift_labels (`torch.Tensor` of shape `(...)`): What each position predicts, see [`next_labels`].
        num_items_in_batch (`torch.Tensor` or `int`, *optional*): What the sum is divided by; by default the number of
            labels that count, which makes it a mean.
        ignore_index (`int`, *optional*, defaults to -100): The label that does not count.

    Returns:
        `torch.Tensor`: the loss, a float32 scalar.
    """
    targets = shift_labels.flatten().to(logits.device)
    total = FrozenHeadLoss.apply(
        hidden_states.flatten(0, -2), logits.detach().flatten(0, -2), head.weight, targets, ignore_index
    )
    if num_items_in_batch is None:
        return total / (targets != ignore_index).sum()
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
