"""Documents that share a row must not see one another: tried out on the real model before training begins.

Transformers keeps documents apart by position ids that begin anew, on some paths only: which one is taken depends on
the model, its attention implementation and the shape of the batch. So three forwards with the run's own number of rows
are compared, in which document B follows document A in a row:

- A's first half is exchanged: nothing of B may change. The computation of B is otherwise the same, so equal means equal
  bit for bit; where kernels work on tokens of several rows together (mixtures of experts) rounding may differ. A's
  second half, whose tokens stay, has to change, otherwise the comparison could not fail and proves nothing.
- B stands before A: the same logits within rounding, since B then begins where its positions begin.
"""

from collections.abc import Callable

import torch

DOCUMENT_TOKENS = 21
"""Tokens of A; B is a few longer, so that the rows of a batch have boundaries in different places."""

ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Largest difference of a token's logits, relative and in the L2 norm, that is put down to rounding. A rounding changes
a number by 0.0011 of it in bf16 (root mean square: 2**-9 / sqrt(3)), and a layer rounds some ten times: 100 layers give
0.0011 * sqrt(10 * 100) = 0.036. 32 layers were seen to give 0.007, documents that see their neighbours 0.006 to 0.3;
what is near the bound is told apart by the exchange, which leaves no rounding."""

SHARE_OF_CONTEXT = 0.02
"""Of the change that the exchange makes in A itself: more of it in B is not rounding. Leaking ones give 0.1 to 0.9."""

Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(input ids, position ids), both int64 [rows, tokens] -> logits [rows, tokens, vocabulary]."""


@torch.no_grad()
def check_isolation(
    forward: Forward,
    model: str,
    *,
    rows: int,
    sequence_length: int,
    vocabulary_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> str | None:
    """Raise unless documents that share a row are kept apart; a line that says what was compared.

    The caller has switched dropout off. Under ZeRO-3 every rank must call it. No random number of training is drawn.

    Args:
        forward: the engine's.
        model: for the error: its class and attention implementation.
        rows: of one forward in the run; the path that a model takes may depend on whether there is one or more.
        sequence_length: of the run; shorter documents are compared where it is short. None is returned below 8 tokens.

    Raises:
        ValueError: a document's logits depend on its neighbour, or the model takes no position ids.
    """
    a = min(DOCUMENT_TOKENS, (sequence_length - 2) // 2)
    if a < 3:
        return None
    random = torch.Generator().manual_seed(0)
    first, other, second = torch.randint(vocabulary_size, (3, a + 2), generator=random)
    first, b = first[:a], a + 2
    changed = torch.cat([other[: a // 2], first[a // 2 :]])

    def logits(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """Logits [tokens, vocabulary] of a row of two documents; the other rows have their boundary elsewhere."""
        pairs = [(before, after)] + [(second, first)] * (rows - 1)
        ids = torch.stack([torch.cat(pair) for pair in pairs])
        positions = torch.stack([torch.cat([torch.arange(len(document)) for document in pair]) for pair in pairs])
        return forward(ids.to(device), positions.to(device))[0].float()

    try:
        behind, behind_changed, ahead = logits(first, second), logits(changed, second), logits(second, first)
    except TypeError as error:
        sentence = f"{model} takes no position ids ({error}), so documents that share a row cannot be kept apart"
        raise ValueError(f"{sentence}: use another model type") from error
    context = _differences(behind[a // 2 : a], behind_changed[a // 2 : a])
    if float(context.max()) == 0:
        return "isolation of documents: not shown, because the logits do not depend on earlier tokens yet"
    leak, shift = _differences(behind[a:], behind_changed[a:]), _differences(behind[a:], ahead[:b])
    allowed = min(ROUNDING[dtype], SHARE_OF_CONTEXT * float(context.median()))
    line = (
        f"an exchange of tokens changes the logits of their own document by {float(context.median()):.2g}, of the one "
        f"behind it by {float(leak.max()):.2g} (allowed {allowed:.2g}), and its place in the row changes them by "
        f"{float(shift.median()):.2g} (allowed {ROUNDING[dtype]:.2g}), relative to their size"
    )
    if not (float(leak.max()) <= allowed and float(shift.median()) <= ROUNDING[dtype]):  # a NaN fails, too
        raise ValueError(
            f"{model} does not keep documents apart that share a row: {line}. Use a model type and an attention "
            f"implementation that follow position ids, as Llama, Qwen and GPT-2 do with sdpa and eager"
        )
    return f"isolation of documents: {line}: PASS"


def _differences(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """L2 norm of the difference of each token's logits, relative to the norm of the logits about their mean."""
    spread = (expected - expected.mean(dim=-1, keepdim=True)).norm(dim=-1)
    return (found - expected).norm(dim=-1) / spread.clamp(min=1e-30)
