"""Cross-entropy sums in fp32 and their normalisation by the global count of target tokens."""

from typing import Any

import torch

CHUNK_ROWS = 1024
"""Tokens whose fp32 logits exist at one time."""


class _CrossEntropySum(torch.autograd.Function):
    """Sum of -log softmax(logits)[target] over counted targets, fp32, a chunk of tokens at a time.

    The logits stay in their own type; only one chunk is fp32 at a time, forward and backward.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        log_normalisers = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
        for start in range(0, len(targets), CHUNK_ROWS):
            piece = slice(start, start + CHUNK_ROWS)
            chunk = logits[piece].float()
            log_normalisers[piece] = torch.logsumexp(chunk, dim=-1)
            picked = chunk.gather(1, targets[piece, None]).squeeze(1)
            # where, not multiply: a non-finite logit in a row without weight must not make the sum non-finite
            total += torch.where(mask[piece], log_normalisers[piece] - picked, 0.0).sum()
        ctx.save_for_backward(logits, targets, mask, log_normalisers)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        logits, targets, mask, log_normalisers = ctx.saved_tensors
        result = torch.empty_like(logits)
        for start in range(0, len(targets), CHUNK_ROWS):
            piece = slice(start, start + CHUNK_ROWS)
            weight = torch.where(mask[piece], gradients[0].float(), 0.0)[:, None]
            chunk = logits[piece].float().sub_(log_normalisers[piece, None]).exp_()
            chunk.scatter_add_(1, targets[piece, None], torch.full_like(weight, -1.0))
            result[piece] = torch.where(weight == 0, 0.0, chunk.mul_(weight)).to(result.dtype)
        return result, None, None


def cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum of the losses of the counted targets, in nats, as an fp32 scalar.

    Args:
        logits: [rows, tokens, vocabulary] in any float type.
        targets: [rows, tokens] int64.
        mask: [rows, tokens] bool; True counts.
    """
    return _CrossEntropySum.apply(logits.flatten(0, 1), targets.flatten(), mask.flatten())


def loss_for_backward(loss_sum: torch.Tensor, global_target_tokens: int, world_size: int) -> torch.Tensor:
    """A rank's loss sum scaled so that the summed gradients are those of one mean over the global batch.

    DeepSpeed averages gradients over ranks (hence `world_size`); accumulation must not divide again, so the engine is
    called with `scale_wrt_gas=False`.
    """
    return loss_sum * (world_size / global_target_tokens)


@torch.no_grad()
def count_correct(logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Counted targets that are the arg max of their logits (same shapes as `cross_entropy_sum`), int64 scalar."""
    return ((logits.argmax(-1) == targets) & mask).sum()
