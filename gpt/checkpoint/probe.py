"""The probe: one row through the live engine, recorded with the weights and held against them wherever they go."""

import math
from collections.abc import Callable

import torch

from gpt.batch import MicroBatch
from gpt.checkpoint.format import Greedy, Probe
from gpt.loss import cross_entropy_sum

POSITIONS = 32
TOP = 32

Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(input ids, position ids), both int64 [rows, tokens] -> logits [rows, tokens, vocabulary]."""


@torch.no_grad()
def make_probe(logits: torch.Tensor, batch: MicroBatch, greedy: Greedy | None) -> Probe | None:
    """Loss and top logits of the first row of `batch`, whose forward on the saved weights gave `logits` [rows, tokens,
    vocabulary], with dropout off (its first row is enough); None where they are not finite, against which nothing could
    be held."""
    counted = int(batch.mask[0].sum())
    loss = float(cross_entropy_sum(logits[:1], batch.targets[:1], batch.mask[:1])) / max(1, counted)
    rows, tokens = batch.input_ids.shape
    positions = sorted({round(i * (tokens - 1) / max(1, POSITIONS - 1)) for i in range(POSITIONS)})
    top = logits[0, positions].float().topk(min(TOP, logits.shape[-1]), dim=-1)
    if not (math.isfinite(loss) and bool(top.values.isfinite().all())):
        return None
    return Probe(
        input_ids=batch.input_ids[0].tolist(),
        position_ids=batch.position_ids[0].tolist(),
        targets=torch.where(batch.mask, batch.targets, -1)[0].tolist(),
        rows=rows,
        loss=loss,
        positions=positions,
        top_indices=top.indices.tolist(),
        top_logits=top.values.tolist(),
        greedy=greedy,
    )


@torch.no_grad()
def check_probe(forward: Forward, probe: Probe, device: torch.device, dtype: torch.dtype) -> tuple[str, bool]:
    """Run the recorded row on what was loaded: how near its logits and loss are, and whether that is near enough.

    A logit may differ by two units in the last place of the largest one: another world size or row count may change
    the order in which a matrix product is summed, and so a rounding, but no more. A token's loss moves by at most twice
    what its logits move, and the errors of many tokens average out.
    """
    # as many rows as were recorded: the shape of a matrix product decides in which order it is summed
    ids = torch.tensor([probe.input_ids] * probe.rows, device=device)
    logits = forward(ids, torch.tensor([probe.position_ids] * probe.rows, device=device))[:1]
    recorded = torch.tensor(probe.top_logits, device=device)
    found = logits[0, probe.positions].float().gather(1, torch.tensor(probe.top_indices, device=device))
    difference = float((found - recorded).abs().max())
    allowed = logit_tolerance(float(recorded.abs().max()), dtype)
    targets = torch.tensor([probe.targets], device=device)
    counted = max(1, int((targets >= 0).sum()))
    loss = float(cross_entropy_sum(logits, targets.clamp(min=0), targets >= 0)) / counted
    allowed_loss = 2 * allowed / counted**0.5
    line = (
        f"logits within {difference:.3g} of the recorded ones (allowed {allowed:.3g}), "
        f"loss {loss:.6g} (recorded {probe.loss:.6g}, allowed difference {allowed_loss:.3g})"
    )
    return line, difference <= allowed and abs(loss - probe.loss) <= allowed_loss  # a NaN is not near


def logit_tolerance(largest: float, dtype: torch.dtype) -> float:
    """Two units in the last place of `largest`; in fp32, where rounding accumulates over many more bits than are
    compared, 1e-4 of it."""
    if dtype == torch.float32:
        return 1e-4 * largest
    spacing = torch.finfo(dtype).eps * 2.0 ** torch.tensor(largest).log2().floor().item()
    return 2 * spacing
