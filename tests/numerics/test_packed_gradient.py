"""Conversations packed into rows give the gradient of the same conversations one by one."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, set_seed

from data_pipeline.chat import ChatRenderer
from data_pipeline.shard_writer import UnitWriter, write_manifest
from data_pipeline.stream import TrainingStream
from data_pipeline.tokenizer import load_tokenizer, train_tokenizer, vocabulary_size
from gpt.batch import micro_batches
from gpt.loss import cross_entropy_sum, loss_for_backward
from gpt.model import checkpoint_gradients
from gpt.trainer import Trainer

SEQUENCE_TOKENS = 320
TURNS = (1, 4, 2, 1, 3, 1)
"""Questions of each of the six conversations: their lengths differ, and so do their shares of counted tokens."""
FEATURES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 320}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "intermediate_size": 70, "tie_word_embeddings": False},
    "qwen3": {"num_key_value_heads": 2, "intermediate_size": 70, "head_dim": 8, "tie_word_embeddings": True},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
Conversation = tuple[list[int], list[bool]]
Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Gradients = dict[str, torch.Tensor]


def _conversation(number: int) -> list[dict[str, str]]:
    messages = []
    for turn in range(TURNS[number]):
        messages.append({"role": "user", "content": f"What is {number} and {turn}?" + " Please?" * (number % 3)})
        messages.append({"role": "assistant", "content": f"It is {number + turn}." + f" So {turn}." * (turn + number)})
    return messages


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Conversation], TrainingStream]:
    """The rendered conversations, and the product's stream of rows over the shards that hold them."""
    texts = [message["content"] for number in range(len(TURNS)) for message in _conversation(number)]
    trained = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(texts * 2, 270, trained)
    tokenizer = load_tokenizer(trained)
    renderer = ChatRenderer(tokenizer)
    conversations = [renderer.render(_conversation(number)) for number in range(len(TURNS))]
    assert len({len(ids) for ids, _ in conversations}) == len(TURNS)
    folder: Path = tmp_path_factory.mktemp("packed") / "train"
    vocabulary = vocabulary_size(tokenizer)
    writer = UnitWriter(folder, kind="chat", vocabulary_size=vocabulary)
    for ids, mask in conversations:
        writer.add_documents(np.array(ids), np.array([len(ids)]), np.array(mask))
    write_manifest(
        folder,
        kind="chat",
        split="train",
        tokenizer_sha256=hashlib.sha256(b"of this test").hexdigest(),
        vocabulary_size=vocabulary,
        special_ids={"eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id},
        shards=writer.finish(),
        units=[],
    )
    return conversations, TrainingStream([(folder, 1.0)], SEQUENCE_TOKENS, seed=3)


def _model(kind: str, attention: str) -> PreTrainedModel:
    config = AutoConfig.for_model(kind, **FEATURES, **MODELS[kind], max_position_embeddings=512)
    set_seed(1)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=attention
    )
    for parameter in model.parameters():  # larger than the usual beginning, so that attention is far from even
        parameter.data.mul_(3.0)
    return model.train()


def _gradients(model: PreTrainedModel) -> Gradients:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def one_by_one(model: PreTrainedModel, conversations: list[Conversation]) -> tuple[Gradients, int]:
    """Plain transformers and torch: no padding, no positions of ours, the sum of losses over the count of targets."""
    total = sum(sum(mask[1:]) for _, mask in conversations)
    model.zero_grad()
    for ids, mask in conversations:
        tokens, counted = torch.tensor([ids]), torch.tensor(mask[1:])
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[counted], tokens[0, 1:][counted], reduction="sum")
        (loss / total).backward()
    return _gradients(model), total


def packed(model: PreTrainedModel, stream: TrainingStream, forward: Forward | None = None) -> tuple[Gradients, int]:
    """The product's way: rows of an epoch, its forwards of two rows, its call of the model and its loss."""
    rows = stream.rows(np.arange(stream.samples_per_epoch))
    forwards = micro_batches(rows, -(-len(rows.input_ids) // 2), 2, torch.device("cpu"))
    total = sum(int(part.mask.sum()) for part in forwards)
    trainer: Any = SimpleNamespace(engine=model)
    model.zero_grad()
    for part in forwards:
        call = forward or (lambda ids, positions: Trainer.forward(trainer, ids, positions))
        loss = cross_entropy_sum(call(part.input_ids, part.position_ids), part.targets, part.mask)
        loss_for_backward(loss, total, world_size=1).backward()
    return _gradients(model), total


def _largest_difference(found: Gradients, expected: Gradients) -> float:
    """The largest difference of an element, in units of the largest element of its tensor."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - value).abs().max() / value.abs().max()) for name, value in expected.items())


@pytest.mark.parametrize("recompute", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", list(MODELS))
def test_packed_gradient_equals_one_by_one(prepared: Any, kind: str, attention: str, recompute: bool) -> None:
    """Both are fp32 sums of the same terms, in matrices of other sizes. Such a sum of n terms is off by about
    sqrt(n) * 2**-24 of their absolute sum: for the 640 tokens here 1.5e-6 (3e-7 to 2.2e-6 of the largest element were
    seen). 1e-5 leaves room for other processors. One neighbour seen, one target too many or a wrong count is a
    difference of 1e-2 and more, see below.
    """
    conversations, stream = prepared
    rows = stream.rows(np.arange(stream.samples_per_epoch))
    beginnings = (rows.position_ids == 0).sum(axis=1)
    assert len(rows.input_ids) < len(conversations) and beginnings.max() >= 3, "nothing is packed"
    model = _model(kind, attention)
    expected, expected_targets = one_by_one(model, conversations)
    if recompute:
        checkpoint_gradients(model, 1)
    found, targets = packed(model, stream)
    assert targets == expected_targets
    assert _largest_difference(found, expected) < 1e-5


@pytest.mark.parametrize(
    "leak",
    [
        pytest.param(lambda model, ids, positions: model(input_ids=ids, use_cache=False), id="no-positions"),
        pytest.param(
            lambda model, ids, positions: model(
                input_ids=ids, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=False
            ),
            id="attention-mask",
        ),
        pytest.param(
            lambda model, ids, positions: model(input_ids=ids, position_ids=positions, use_cache=True), id="cache"
        ),
    ],
)
def test_calls_that_let_documents_see_each_other_give_another_gradient(prepared: Any, leak: Any) -> None:
    """What `Trainer.forward` must not do: the comparison above sees each of them."""
    conversations, stream = prepared
    model = _model("llama", "sdpa")
    expected, _ = one_by_one(model, conversations)
    found, _ = packed(model, stream, lambda ids, positions: leak(model, ids, positions).logits)
    assert _largest_difference(found, expected) > 1e-2
