"""The probe: one row through the live engine, recorded with the weights and held against them wherever they go."""

from collections.abc import Callable

import torch

from gpt.checkpoint.format import Greedy, Probe
from gpt.loss import cross_entropy_sum

POSITIONS = 32
TOP = 32

Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(input ids, position ids), both int64 [rows, tokens] -> logits [rows, tokens, vocabulary]."""


@torch.no_grad()
def make_probe(
    forward: Forward,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor,
    greedy: Greedy | None,
) -> Probe:
    """Run one row ([1, tokens] each, the mask bool) and record its loss and the top logits of some positions.

    The caller has switched dropout off. Under ZeRO-3 every rank must call it, with the same row.
    """
    logits = forward(input_ids, position_ids)
    counted = int(mask.sum())
    loss = float(cross_entropy_sum(logits, targets, mask)) / max(1, counted)
    tokens = input_ids.shape[1]
    positions = sorted({round(i * (tokens - 1) / max(1, POSITIONS - 1)) for i in range(POSITIONS)})
    top = logits[0, positions].float().topk(min(TOP, logits.shape[-1]), dim=-1)
    return Probe(
        input_ids=input_ids[0].tolist(),
        position_ids=position_ids[0].tolist(),
        targets=torch.where(mask, targets, -1)[0].tolist(),
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
    ids = torch.tensor([probe.input_ids], device=device)
    logits = forward(ids, torch.tensor([probe.position_ids], device=device))
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
