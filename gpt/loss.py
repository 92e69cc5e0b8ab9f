"""Cross-entropy sums in fp32 and their normalisation by the global count of target tokens."""

from typing import Any

import torch

CHUNK_ROWS = 1024
"""Tokens whose fp32 logits exist at one time."""


class _CrossEntropySums(torch.autograd.Function):
    """(What is minimised, sum of -log softmax(logits)[target]) over counted targets, fp32, a chunk of tokens at a time.

    The logits stay in their own type; only one chunk is fp32 at a time, forward and backward.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor, label_smoothing: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        total, smoothing = torch.zeros(2, dtype=torch.float32, device=logits.device)
        log_normalisers = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
        for start in range(0, len(targets), CHUNK_ROWS):
            piece = slice(start, start + CHUNK_ROWS)
            chunk = logits[piece].float()
            log_normalisers[piece] = torch.logsumexp(chunk, dim=-1)
            picked = chunk.gather(1, targets[piece, None]).squeeze(1)
            # where, not multiply: a non-finite logit in a row without weight must not make the sum non-finite
            total += torch.where(mask[piece], log_normalisers[piece] - picked, 0.0).sum()
            if label_smoothing:
                smoothing += torch.where(mask[piece], picked - chunk.mean(-1), 0.0).sum()
        ctx.save_for_backward(logits, targets, mask, log_normalisers)
        ctx.label_smoothing = label_smoothing
        ctx.mark_non_differentiable(total)
        return total + label_smoothing * smoothing, total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        logits, targets, mask, log_normalisers = ctx.saved_tensors
        result = torch.empty_like(logits)
        for start in range(0, len(targets), CHUNK_ROWS):
            piece = slice(start, start + CHUNK_ROWS)
            weight = torch.where(mask[piece], gradients[0].float(), 0.0)[:, None]
            chunk = logits[piece].float().sub_(log_normalisers[piece, None]).exp_()
            chunk.scatter_add_(1, targets[piece, None], torch.full_like(weight, ctx.label_smoothing - 1.0))
            if ctx.label_smoothing:
                chunk.sub_(ctx.label_smoothing / chunk.shape[-1])
            result[piece] = torch.where(weight == 0, 0.0, chunk.mul_(weight)).to(result.dtype)
        return result, None, None, None


def smoothed_cross_entropy_sums(
    logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor, label_smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sums over the counted targets, in nats, as fp32 scalars: of the cross-entropy with a target distribution that
    gives `label_smoothing` to all tokens alike and the rest to the target, and, without a gradient, of the plain loss.

    Args:
        logits: [rows, tokens, vocabulary] in any float type.
        targets: [rows, tokens] int64.
        mask: [rows, tokens] bool; True counts.
    """
    sums: tuple[torch.Tensor, torch.Tensor] = _CrossEntropySums.apply(
        logits.flatten(0, 1), targets.flatten(), mask.flatten(), label_smoothing
    )
    return sums


def cross_entropy_sum(logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The plain one of `smoothed_cross_entropy_sums`, with its gradient."""
    return smoothed_cross_entropy_sums(logits, targets, mask, 0.0)[0]


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
