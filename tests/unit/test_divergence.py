"""What counts as diverged, where a non-finite value began, and which samples a run leaves out."""

import random
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from gpt.batch import BatchPositions
from gpt.divergence import LossWatch, first_non_finite, robust_z_score
from gpt.recipe import Divergence

SETTINGS = Divergence(skipped_steps=3, spike_window_steps=20, spike_steps=2)


def make_watch(settings: Divergence = SETTINGS, warmup_steps: int = 5, change: int = 10**9) -> LossWatch:
    return LossWatch(settings, warmup_steps, stage=lambda step: int(step > change))


def falling_losses(steps: int, seed: int = 0) -> list[float]:
    noise = np.random.default_rng(seed).normal(0, 0.05, steps)
    return [float(2 + 6 * 0.97**step + noise[step]) for step in range(steps)]


def see_all(watch: LossWatch, losses: list[float], first: int = 1, can_go_back: bool = True) -> list[tuple[int, int]]:
    """(step, first step at fault) of each fault."""
    found = []
    for step, loss in enumerate(losses, first):
        fault = watch.see(step, loss, applied=bool(np.isfinite(loss)), can_go_back=can_go_back)
        if fault is not None:
            found.append((step, fault.first_step))
    return found


# a fault


def test_an_ordinary_run_has_no_fault() -> None:
    for seed in range(20):
        assert not see_all(make_watch(Divergence(spike_window_steps=20)), falling_losses(2000, seed))


def test_spikes_in_a_row_are_a_fault_and_one_alone_is_not() -> None:
    losses = falling_losses(200)
    assert not see_all(make_watch(), [*losses[:100], 9.0, *losses[101:]])
    assert see_all(make_watch(), [*losses[:100], 9.0, 9.5]) == [(102, 101)]
    assert see_all(make_watch(), [*losses[:100], 9.0, losses[101], 9.0, 9.5]) == [(104, 103)]
    assert not see_all(make_watch(SETTINGS.model_copy(update={"spike_z_score": None})), [*losses[:100], 9.0, 9.5])
    assert not see_all(make_watch(), [*losses[:100], 9.0, 9.5], can_go_back=False)


def test_no_spike_before_the_window_is_full() -> None:
    """It begins after the 5 steps of warm-up and holds 20 losses: the 26th step is the first that may be one."""
    losses = [3.0 + 0.01 * (step % 3) for step in range(40)]
    assert not see_all(make_watch(), [*losses[:24], 9.0, 9.0])
    assert see_all(make_watch(), [*losses[:25], 9.0, 9.0]) == [(27, 26)]


def test_losses_of_another_stage_of_the_data_are_not_compared() -> None:
    losses = [2.0 + 0.01 * (step % 3) for step in range(50)] + [4.0 + 0.01 * (step % 3) for step in range(50)]
    assert see_all(make_watch(), losses)[0] == (52, 51)
    assert not see_all(make_watch(change=50), losses)


def test_steps_in_a_row_that_are_not_finite_are_a_fault() -> None:
    nan = float("nan")
    assert not see_all(make_watch(), [3.0, nan, nan, 3.0, nan, nan])
    assert see_all(make_watch(), [3.0, nan, float("inf"), nan], can_go_back=False) == [(4, 2)]
    watch = make_watch()  # a finite loss whose gradient was not
    faults = [watch.see(step, 3.0, applied=False, can_go_back=True) for step in (7, 8, 9)]
    assert faults[:2] == [None, None] and faults[2] is not None and faults[2].first_step == 7


def test_a_loss_that_hardly_varies_has_a_smallest_spread() -> None:
    assert robust_z_score(2.1, [2.0] * 20) == pytest.approx(5.0)
    assert robust_z_score(4.0, [1.0, 2.0, 3.0]) == pytest.approx(2 * 0.6745)


@pytest.mark.parametrize("seed", range(30))
def test_a_watch_that_is_restored_sees_what_the_uninterrupted_one_sees(seed: int) -> None:
    """Random losses with many spikes and gaps; the end of each step is held against a watch restored there."""
    dice = random.Random(seed)
    settings = Divergence(skipped_steps=2, spike_window_steps=8, spike_steps=dice.choice([1, 2, 3]), spike_z_score=2)
    losses = [dice.choice([2.0, 2.1, 2.2, 2.3, 9.0, float("nan")]) for _ in range(150)]
    whole = make_watch(settings, change=70)
    faults = 0
    for cut in range(len(losses) - 1):
        step = cut + 1
        if whole.see(step, losses[cut], applied=bool(np.isfinite(losses[cut])), can_go_back=True) is not None:
            faults += 1
        resumed = make_watch(settings, change=70)
        past = [(s, loss) for s, loss in enumerate(losses[:step], 1) if np.isfinite(loss)]
        row = next((i for i, loss in enumerate(reversed(losses[:step])) if np.isfinite(loss)), step)
        resumed.restore(past[-resumed.memory_steps :], row)
        assert vars(resumed) | {"_stage": None} == vars(whole) | {"_stage": None}, f"after step {step}"
    assert faults


# the samples that are left out


def test_positions_pass_over_what_is_left_out() -> None:
    assert [BatchPositions(4).first(step) for step in (1, 2, 3)] == [0, 4, 8]
    positions = BatchPositions(4, ((16, 20), (4, 8), (8, 12)))
    assert positions.skipped == ((4, 12), (16, 20))
    assert [positions.first(step) for step in (1, 2, 3, 4)] == [0, 12, 20, 24]
    assert positions.of_steps(2, 3) == (12, 24)
    assert BatchPositions(4, ((0, 4),)).first(1) == 4


@pytest.mark.parametrize("samples", [(3, 8), (4, 7), (8, 8), (-4, 4), (8, 4)])
def test_what_is_not_whole_global_batches_is_refused(samples: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="not whole global batches of 4 samples"):
        BatchPositions(4, (samples,))


def test_random_ranges_leave_out_exactly_their_samples() -> None:
    """Against the plain definition: the global batches in order, without those that lie in a range."""
    dice = random.Random(0)
    for _ in range(500):
        sequences = dice.randrange(1, 9)
        starts = [dice.randrange(30) for _ in range(dice.randrange(6))]
        ranges = tuple((s * sequences, (s + dice.randrange(1, 6)) * sequences) for s in starts)
        positions = BatchPositions(sequences, ranges)
        left = [p for p in range(0, 90 * sequences, sequences) if not any(a <= p < b for a, b in ranges)]
        assert [positions.first(step) for step in range(1, 30)] == left[:29]
        assert BatchPositions(sequences, positions.skipped) == positions
        # going back: the steps before the fault keep their samples, the ones after it go on behind it
        first, last = sorted((dice.randrange(1, 30), dice.randrange(1, 30)))
        after = BatchPositions(sequences, (*positions.skipped, positions.of_steps(first, last)))
        assert [after.first(step) for step in range(1, 40)] == left[: first - 1] + left[last : last + 40 - first]


# where it began


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    result: PreTrainedModel = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("llama", vocab_size=31, use_cache=False, **sizes)
    )
    return result.train()


def origin_of(model: PreTrainedModel, module: str, hook: Any, forwards: int = 2) -> str:
    """Run forwards and backwards with a forward hook on one module; what was found first."""
    handle = model.get_submodule(module).register_forward_hook(hook)
    try:
        with first_non_finite(model, rank=3) as found:
            for number in range(forwards):
                ids = torch.arange(10)[None] + number
                model(input_ids=ids, labels=ids).loss.backward()
    finally:
        handle.remove()
        model.zero_grad()
    return str(found[0]) if found else "nothing"


def multiply_gradient(factor: float) -> Any:
    def hook(module: Any, args: Any, output: torch.Tensor) -> None:
        output.register_hook(lambda gradient: gradient * factor)

    return hook


def test_the_module_whose_output_is_not_finite_is_found(model: PreTrainedModel) -> None:
    place = "model.layers.1.mlp.up_proj"
    assert origin_of(model, place, lambda m, a, out: out * 2) == "nothing"
    assert origin_of(model, place, lambda m, a, out: out / 0) == f"the output of {place} (rank 3, micro-batch 1)"
    calls: list[int] = []

    def second_time(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        calls.append(1)
        return output * float("nan") if len(calls) == 2 else None

    assert origin_of(model, place, second_time) == f"the output of {place} (rank 3, micro-batch 2)"


@pytest.mark.parametrize("place", ["model.layers.0.self_attn.k_proj", "model.layers.0.mlp.up_proj", "lm_head"])
def test_the_module_whose_gradient_is_not_finite_is_found(model: PreTrainedModel, place: str) -> None:
    expected = f"the gradient of {place} (rank 3, micro-batch 1)"
    assert origin_of(model, place, multiply_gradient(float("inf"))) == expected


def test_a_frozen_module_is_not_blamed_for_another_that_shares_its_input(model: PreTrainedModel) -> None:
    mlp = model.get_submodule("model.layers.0.mlp").requires_grad_(False)
    place = "model.layers.0.mlp.up_proj"  # gate_proj reads the same tensor, and comes first
    found = origin_of(model, place, multiply_gradient(float("inf")))
    mlp.requires_grad_(True)
    assert found == f"the gradient of {place} (rank 3, micro-batch 1)"


def test_a_gradient_of_a_weight_alone_is_found(model: PreTrainedModel) -> None:
    weight = model.get_submodule("model.layers.1.mlp.gate_proj").weight
    handle = weight.register_hook(lambda gradient: gradient / 0)
    found = origin_of(model, "lm_head", lambda *_: None)
    handle.remove()
    assert found == "the gradient of model.layers.1.mlp.gate_proj (rank 3, micro-batch 1)"


def test_watching_changes_nothing_but_roundings_and_leaves_no_hook(model: PreTrainedModel) -> None:
    def gradients(watched: bool) -> list[torch.Tensor]:
        ids = torch.arange(12)[None]
        with first_non_finite(model, rank=0) if watched else nullcontext():
            model(input_ids=ids, labels=ids).loss.backward()
        result = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return result

    expected = gradients(watched=False)
    for mine, theirs in zip(gradients(watched=True), expected, strict=True):  # summed in another order
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(p._backward_hooks for p in model.parameters())
