"""Loss sums and their gradients against torch's own cross-entropy in float64."""

import math
from typing import Any

import pytest
import torch
from recipe_samples import make_recipe
from small_checkpoint import make_model
from transformers.trainer_pt_utils import LabelSmoother

from gpt.loss import (
    CHUNK_ROWS,
    OutputLayer,
    count_correct,
    cross_entropy_sum,
    loss_for_backward,
    output_layer,
    smoothed_cross_entropy_sums,
)

# rows x tokens: one chunk, an exact chunk, and chunks with a rest
SHAPES = [(2, 7), (4, CHUNK_ROWS // 4), (3, CHUNK_ROWS // 2 + 5)]
VOCABULARY = 37
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2**-8}
"""Relative size of a gradient's rounding to the type of its logits, beyond fp32's own."""
FP32_ERROR = 4e-6
"""Of a probability: exponents reach 20, which fp32 knows to 2e-6."""


def make(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(*shape, VOCABULARY, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(0, VOCABULARY, shape, generator=generator)
    mask = torch.rand(shape, generator=generator) < 0.6
    mask[0] = False
    mask[-1, -2:] = torch.tensor([False, True])
    return logits, targets, mask


def reference(logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor) -> tuple[float, torch.Tensor]:
    exact = logits.detach().double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(exact[mask], targets[mask], reduction="sum")
    loss.backward()
    assert exact.grad is not None
    return loss.item(), exact.grad


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", SHAPES)
def test_sum_and_gradient_equal_torchs_in_float64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    logits, targets, mask = make(shape, dtype)
    loss = cross_entropy_sum(logits, targets, mask)
    expected, expected_gradient = reference(logits, targets, mask)
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    assert loss.item() == pytest.approx(expected, rel=1e-6)
    (3.0 * loss).backward()
    assert logits.grad is not None
    assert logits.grad.dtype == dtype
    difference = (logits.grad.double() / 3 - expected_gradient).abs()
    assert bool((difference <= ROUNDING[dtype] * expected_gradient.abs() + FP32_ERROR).all())


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", SHAPES)
def test_label_smoothing_is_that_of_transformers(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """In float64, as a sum. The plain loss stays beside it, without a gradient."""
    logits, targets, mask = make(shape, dtype)
    minimised, plain = smoothed_cross_entropy_sums(logits, targets, mask, 0.3)
    exact = logits.detach().double().requires_grad_()
    expected = LabelSmoother(0.3)({"logits": exact}, torch.where(mask, targets, -100), num_items_in_batch=1)
    expected.backward()
    assert minimised.item() == pytest.approx(expected.item(), rel=1e-6)
    assert plain.item() == pytest.approx(reference(logits, targets, mask)[0], rel=1e-6)
    assert not plain.requires_grad
    (3.0 * minimised).backward()
    assert logits.grad is not None and exact.grad is not None
    difference = (logits.grad.double() / 3 - exact.grad).abs()
    assert bool((difference <= ROUNDING[dtype] * exact.grad.abs() + FP32_ERROR).all())


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_the_sum_of_bf16_logits_is_taken_in_fp32(label_smoothing: float) -> None:
    """Adding 4,096 losses of about 3.6 in bf16 would stop at 1,024, where the spacing is 8."""
    logits = torch.zeros(4, 1024, VOCABULARY, dtype=torch.bfloat16)
    targets = torch.zeros(4, 1024, dtype=torch.int64)
    mask = torch.ones(4, 1024, dtype=torch.bool)
    for loss in smoothed_cross_entropy_sums(logits, targets, mask, label_smoothing):
        assert float(loss) == pytest.approx(4096 * math.log(VOCABULARY), rel=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_in_a_masked_row_stays_there(value: float) -> None:
    logits, targets, mask = make((3, 6), torch.float32)
    clean, clean_gradient = reference(logits, targets, mask)
    with torch.no_grad():
        logits[~mask] = value
    assert bool(smoothed_cross_entropy_sums(logits, targets, mask, 0.3)[0].isfinite())
    loss = cross_entropy_sum(logits, targets, mask)
    loss.backward()
    assert float(loss) == pytest.approx(clean, rel=1e-6)
    assert logits.grad is not None
    assert bool((logits.grad[~mask] == 0).all())
    torch.testing.assert_close(logits.grad.double(), clean_gradient, rtol=0, atol=FP32_ERROR)


def test_what_is_not_finite_in_a_counted_row_is_seen() -> None:
    logits, targets, mask = make((3, 6), torch.float32)
    row, column = mask.nonzero()[0].tolist()
    with torch.no_grad():
        logits[row, column, 0] = float("nan")
    loss = cross_entropy_sum(logits, targets, mask)
    loss.backward()
    assert torch.isnan(loss)
    assert logits.grad is not None
    assert bool(torch.isnan(logits.grad[row, column]).all())


def test_nothing_counted_gives_zero_and_no_gradient() -> None:
    logits, targets, mask = make((2, 5), torch.bfloat16)
    loss = cross_entropy_sum(logits, targets, torch.zeros_like(mask))
    loss.backward()
    assert float(loss) == 0.0
    assert logits.grad is not None
    assert bool((logits.grad == 0).all())


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([[[3e4, 0.0], [0.0, 3e4]]], requires_grad=True)
    loss = cross_entropy_sum(logits, torch.tensor([[0, 0]]), torch.ones(1, 2, dtype=torch.bool))
    loss.backward()
    assert float(loss) == pytest.approx(3e4)
    assert logits.grad is not None
    assert logits.grad.tolist() == [[[0.0, 0.0], [-1.0, 1.0]]]


def fused(hidden: torch.Tensor, layer: torch.nn.Linear, targets: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    with OutputLayer(layer).gives_loss(targets, mask):
        return layer(hidden)


def make_output(
    shape: tuple[int, int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.nn.Linear, torch.Tensor, torch.Tensor]:
    """Hidden states, an output layer of logits about as large as those of `make`, targets and mask."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(*shape, 16, generator=generator).to(dtype).requires_grad_()
    layer = torch.nn.Linear(16, VOCABULARY, bias=False)
    layer.weight = torch.nn.Parameter(torch.randn(VOCABULARY, 16, generator=generator).to(dtype))
    return hidden, layer, *make(shape, dtype)[1:]


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", SHAPES)
def test_an_output_layer_gives_the_loss_and_gradients_of_its_whole_logits(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    hidden, layer, targets, mask = make_output(shape, dtype)
    cross_entropy_sum(layer(hidden), targets, mask).mul(3.0).backward()
    whole = cross_entropy_sum(layer(hidden), targets, mask)
    expected = [hidden.grad, layer.weight.grad]
    hidden.grad = layer.weight.grad = None
    loss = fused(hidden, layer, targets, mask)
    assert (loss.dtype, loss.shape) == (torch.float32, ())
    assert loss.item() == pytest.approx(whole.item(), rel=1e-6)
    (3.0 * loss).backward()
    for found, plain in zip([hidden.grad, layer.weight.grad], expected, strict=True):
        assert found is not None and plain is not None and found.dtype == dtype
        # each is rounded where it is made and, here, where it is scaled: relative to the largest element
        difference = (found.double() - plain.double()).abs().max()
        assert difference <= max(2 * ROUNDING[dtype], FP32_ERROR) * plain.double().abs().max()
    assert layer(hidden).shape == (*shape, VOCABULARY), "outside it gives logits again"


def test_an_output_layer_also_gives_the_first_rows_logits_where_asked() -> None:
    hidden, layer, targets, mask = make_output((3, 6), torch.float32)
    fused(hidden, layer, targets, mask).backward()
    assert hidden.grad is not None
    expected, whole = hidden.grad.clone(), layer(hidden).detach()
    hidden.grad = None
    output = OutputLayer(layer)
    with output.gives_loss(targets, mask, first_row=True) as first_row:
        layer(hidden).backward()
    [logits] = first_row
    torch.testing.assert_close(logits, whole[:1], rtol=0, atol=1e-5)
    assert not logits.requires_grad and torch.equal(hidden.grad, expected)
    with output.gives_loss(targets, mask) as nothing:
        layer(hidden)
    assert nothing == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_output_layer_keeps_what_is_not_finite_in_its_row(value: float) -> None:
    hidden, layer, targets, mask = make_output((3, 6), torch.float32)
    cross_entropy_sum(layer(hidden), targets, mask).backward()
    clean = layer.weight.grad
    assert clean is not None
    layer.weight.grad = None
    with torch.no_grad():
        hidden[~mask] = value
    loss = fused(hidden, layer, targets, mask)
    loss.backward()
    assert torch.isfinite(loss)
    assert hidden.grad is not None and bool((hidden.grad[~mask] == 0).all())
    row, column = mask.nonzero()[0].tolist()
    with torch.no_grad():
        hidden[row, column] = value
    assert not torch.isfinite(fused(hidden, layer, targets, mask))


def test_a_frozen_output_layer_gets_no_gradient() -> None:
    hidden, layer, targets, mask = make_output((2, 7), torch.bfloat16)
    layer.weight.requires_grad_(False)
    fused(hidden, layer, targets, mask).backward()
    assert layer.weight.grad is None and hidden.grad is not None


@pytest.mark.parametrize(
    ("model_type", "fields", "can"),
    [
        ("llama", {}, True),
        ("gpt2", {"tie_word_embeddings": True}, True),
        ("gemma2", {"head_dim": 8, "final_logit_softcapping": 1.0}, False),  # bounded afterwards
        ("cohere", {"logit_scale": 0.5}, False),  # scaled afterwards
        ("phi", {}, False),  # with a bias
    ],
)
def test_only_where_logits_are_the_layers_product_it_gives_the_loss(
    model_type: str, fields: dict[str, Any], can: bool
) -> None:
    model = make_model(model_type, **fields)
    found = output_layer(make_recipe(), model, model, torch.device("cpu"))
    assert (found is not None) == can
    assert model(input_ids=torch.zeros(1, 3, dtype=torch.int64)).logits.shape[:2] == (1, 3)


@pytest.mark.parametrize("changes", [{"fused_loss": False}, {"train.label_smoothing": 0.1}])
def test_the_recipe_can_need_whole_logits(changes: dict[str, Any]) -> None:
    model = make_model()
    assert output_layer(make_recipe(changes), model, model, torch.device("cpu")) is None


def test_scaled_rank_sums_give_the_gradient_of_one_mean_over_the_global_batch() -> None:
    """Two ranks of two ragged micro-batches, averaged over ranks as DeepSpeed does, against the mean over all."""
    torch.manual_seed(0)
    weight = torch.randn(8, VOCABULARY, dtype=torch.float64)
    inputs = torch.randn(4, 3, 5, 8, dtype=torch.float64)  # micro-batches (two a rank) of 3 rows of 5 tokens
    targets = torch.randint(0, VOCABULARY, (4, 3, 5))
    mask = torch.rand(4, 3, 5) < torch.tensor([0.9, 0.2, 0.5, 0.0])[:, None, None]
    count = int(mask.sum())
    together = weight.clone().requires_grad_()
    logits = inputs @ together
    torch.nn.functional.cross_entropy(logits[mask], targets[mask]).backward()
    ranks = []
    for rank in range(2):
        shared = weight.clone().requires_grad_()
        for part in (2 * rank, 2 * rank + 1):
            loss = cross_entropy_sum((inputs[part] @ shared).float(), targets[part], mask[part])
            loss_for_backward(loss, count, world_size=2).backward()
        ranks.append(shared.grad)
    assert together.grad is not None
    averaged = (ranks[0] + ranks[1]) / 2
    torch.testing.assert_close(averaged, together.grad, rtol=1e-5, atol=1e-8)


def test_correct_predictions_are_counted_where_targets_count() -> None:
    logits = torch.tensor([[[2.0, 1.0, 0.0], [0.0, 1.0, 2.0], [0.0, 3.0, 1.0], [1.0, 0.0, 0.0]]])
    targets = torch.tensor([[0, 2, 0, 0]])
    assert int(count_correct(logits, targets, torch.tensor([[True, True, True, True]]))) == 3
    assert int(count_correct(logits, targets, torch.tensor([[True, False, True, False]]))) == 1
    assert int(count_correct(logits.bfloat16(), targets, torch.zeros(1, 4, dtype=torch.bool))) == 0
