"""The check at start-up: models that keep documents apart pass, every way of mixing them is refused."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_checkpoint import make_model
from transformers import AutoConfig, AutoModelForCausalLM

from gpt.isolation import check_isolation

VOCABULARY = 260


def check(forward: Callable[..., torch.Tensor], rows: int = 2, length: int = 128, dtype: Any = torch.float32) -> str:
    line = check_isolation(
        forward,
        "TheModel with its attention",
        rows=rows,
        sequence_length=length,
        vocabulary_size=VOCABULARY,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    assert line is not None
    return line


def as_trained(model: Any, **settings: Any) -> Callable[..., torch.Tensor]:
    def forward(input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return model(**{"input_ids": input_ids, "position_ids": position_ids, "use_cache": False} | settings).logits

    return forward


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_models_that_follow_position_ids_pass(model_type: str, dtype: torch.dtype, rows: int) -> None:
    model = make_model(model_type).to(dtype)
    before, started = torch.get_rng_state(), time.perf_counter()
    line = check(as_trained(model), rows=rows, dtype=dtype)
    assert time.perf_counter() - started < 1
    assert torch.equal(torch.get_rng_state(), before)
    assert line.endswith("PASS")
    assert "of the one behind it by 0 " in line  # bit for bit


@pytest.mark.parametrize("length", [8, 9, 40, 4096])
def test_short_sequences_are_compared_in_short_documents(length: int) -> None:
    seen: list[int] = []
    forward = as_trained(make_model())

    def watched(input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        seen.append(input_ids.shape[1])
        return forward(input_ids, position_ids)

    assert check(watched, length=length).endswith("PASS")
    assert max(seen) <= length


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "leak",
    [{"use_cache": True}, {"attention_mask": "ones"}, {"position_ids": None}],
    ids=["cache", "mask", "positions"],
)
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_neighbour_that_is_seen_is_refused(model_type: str, leak: dict[str, Any], dtype: torch.dtype) -> None:
    """The ways in which transformers itself is known to join documents."""
    model = make_model(model_type).to(dtype)

    def forward(input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        settings = {"attention_mask": torch.ones_like(input_ids)} if "attention_mask" in leak else leak
        return as_trained(model, **settings)(input_ids, position_ids)

    with pytest.raises(ValueError, match="TheModel with its attention does not keep documents apart") as caught:
        check(forward, dtype=dtype)
    assert "\n" not in str(caught.value)


def test_documents_apart_but_at_wrong_positions_are_refused() -> None:
    """Positions of the second document that go on from 5: the attention still splits there."""
    model = make_model("gpt2")

    def forward(input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        later = (position_ids == 0).cumsum(dim=1) > 1
        return as_trained(model)(input_ids, position_ids + 5 * later)

    with pytest.raises(ValueError, match=r"does not keep documents apart.*of the one behind it by 0 "):
        check(forward)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recurrent_model_is_refused(dtype: torch.dtype) -> None:
    config = AutoConfig.for_model("mamba", vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with pytest.raises(ValueError, match="does not keep documents apart"):
        check(as_trained(model), dtype=dtype)


def test_a_model_without_position_ids_is_refused() -> None:
    def forward(input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        raise TypeError("forward() got an unexpected keyword argument 'position_ids'")

    with pytest.raises(ValueError, match="TheModel with its attention takes no position ids"):
        check(forward)


def test_logits_that_depend_on_nothing_prove_nothing() -> None:
    model = make_model()
    torch.nn.init.zeros_(model.lm_head.weight)
    assert "not shown" in check(as_trained(model))


def test_logits_that_are_no_numbers_are_refused() -> None:
    def forward(input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        return torch.full((*input_ids.shape, VOCABULARY), torch.nan)

    with pytest.raises(ValueError, match="does not keep"):
        check(forward)
