"""Cross-entropy sums in fp32 and their normalisation by the global count of target tokens."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from gpt.recipe import Recipe

CHUNK_ROWS = 512
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


class _OutputLossSum(torch.autograd.Function):
    """An output layer and the sum of its losses, a chunk of tokens at a time: neither logits nor their gradient are
    ever whole. The gradients are made in the forward, while the chunk's exponentials are there."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # the sum over chunks, rounded once at its end
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for start in range(0, len(targets), CHUNK_ROWS):
            piece = slice(start, start + CHUNK_ROWS)
            counted, aims = mask[piece, None], targets[piece, None]
            chunk = (hidden[piece] @ weight.t()).float()
            picked, largest = chunk.gather(1, aims), chunk.amax(1, keepdim=True)
            sums = chunk.sub_(largest).exp_().sum(1, keepdim=True)
            total += torch.where(counted, sums.log() + largest - picked, 0.0).sum()
            chunk.div_(sums).scatter_add_(1, aims, torch.full_like(sums, -1.0))
            if not counted.all():  # not a product: what is not finite in a row without weight must not spread
                chunk.masked_fill_(~counted, 0.0)
            gradient = chunk.to(hidden.dtype)
            if of_hidden is not None:
                of_hidden[piece] = gradient @ weight
            if of_weight is not None:
                of_weight += gradient.t() @ hidden[piece]
        ctx.save_for_backward(of_hidden, of_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        of_hidden, of_weight = (None if g is None else (g * gradients[0]).to(ctx.dtype) for g in ctx.saved_tensors)
        return of_hidden, of_weight, None, None


class OutputLayer:
    """A model's output layer, which gives the sum of the losses in place of logits where it is asked to."""

    def __init__(self, layer: Any) -> None:
        self._layer, self._logits = layer, layer.forward
        self._wanted: tuple[torch.Tensor, torch.Tensor] | None = None
        self._first_row: list[torch.Tensor] | None = None
        layer.forward = self._forward

    def _forward(self, hidden: torch.Tensor) -> torch.Tensor:
        if self._wanted is None:
            return self._logits(hidden)
        if self._first_row is not None:
            with torch.no_grad():
                self._first_row.append(self._logits(hidden[:1]))
        targets, mask = self._wanted
        return _OutputLossSum.apply(hidden.flatten(0, 1), self._layer.weight, targets.flatten(), mask.flatten())

    @contextlib.contextmanager
    def gives_loss(
        self, targets: torch.Tensor, mask: torch.Tensor, *, first_row: bool = False
    ) -> Iterator[list[torch.Tensor]]:
        """Inside, what the model calls its logits is `cross_entropy_sum` of them. With `first_row` the first row's
        logits [1, tokens, vocabulary] are then in the list."""
        rows: list[torch.Tensor] = []
        self._wanted, self._first_row = (targets, mask), rows if first_row else None
        try:
            yield rows
        finally:
            self._wanted = self._first_row = None


@torch.no_grad()
def output_layer(recipe: Recipe, model: Any, forward: Any, device: torch.device) -> OutputLayer | None:
    """A model's output layer as an `OutputLayer`; None where the recipe or the model needs whole logits.

    These must be what a matrix product alone gives, as one token shows: some models scale or bound them afterwards,
    others add a bias. Under ZeRO-3 every rank must call this, and `forward` is the engine's.
    """
    layer = model.get_output_embeddings()
    if recipe.fused_loss is False or recipe.train.label_smoothing:
        return None
    if not isinstance(layer, torch.nn.Linear) or layer.bias is not None:
        return None
    given: list[torch.Tensor] = []
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    model.eval()
    handle = layer.register_forward_hook(lambda module, args, output: given.append(output.clone()))
    logits = forward(input_ids=token, position_ids=token, use_cache=False).logits
    handle.remove()
    alike = len(given) == 1 and given[0].dtype == logits.dtype and torch.equal(given[0], logits)
    return OutputLayer(layer) if alike else None


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
