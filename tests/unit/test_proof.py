"""The resume proof's comparisons: each passes what a run writes, and names both values where one is changed."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from recipe_samples import make_recipe
from small_checkpoint import make_model, write_checkpoint

from gpt.batch import MicroBatch
from gpt.checkpoint.files import sum_of_squares
from gpt.checkpoint.format import Manifest, read_manifest
from gpt.checkpoint.probe import check_probe, make_probe
from gpt.optimizer import Schedule
from gpt.proof import compare_learning_rate, compare_norms, compare_position, compare_step

RECIPE = make_recipe({"train.steps": 20})
SCHEDULE = Schedule(RECIPE.optimizer, 20)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Of step 10 of a run of RECIPE, with 8 sequences of 32 tokens a step."""
    found = read_manifest(write_checkpoint(tmp_path_factory.mktemp("proof") / "run", make_model()))
    return with_rate(found, SCHEDULE.learning_rate(10)).model_copy(
        update={"tokens": 2560, "samples_consumed": 80, "recipe": RECIPE.model_dump(mode="json")}
    )


def with_rate(manifest: Manifest, rate: float) -> Manifest:
    groups = [
        group.model_copy(update={"settings": group.settings | {"lr": rate}}) for group in manifest.optimizer.groups
    ]
    return manifest.model_copy(update={"optimizer": manifest.optimizer.model_copy(update={"groups": groups})})


def test_norms() -> None:
    recorded = {"a": {"fp32": 3.0, "exp_avg": 0.0}, "b": {"fp32": 1e-20}}
    live = {("fp32", "a"): 3.0 * (1 + 1e-12), ("exp_avg", "a"): 0.0, ("fp32", "b"): 1e-20}
    assert compare_norms(recorded, live) == (["3 norms"], [])
    for key, value, said in (
        (("fp32", "a"), 3.0 * (1 + 1e-9), r"fp32/a is 3.000000003 in the engine, 3.0 in the manifest (1 of 3"),
        (("exp_avg", "a"), 1e-30, "exp_avg/a is 1e-30 in the engine, 0.0 in"),
        (("fp32", "b"), 0.0, "fp32/b is 0 in the engine, 1e-20 in"),
        (("fp32", "b"), math.nan, "fp32/b is nan in the engine"),
        (("fp32", "c"), 1.0, "fp32/c is 1 in the engine, None in the manifest (1 of 4"),
    ):
        agrees, [line] = compare_norms(recorded, live | {key: value})
        assert not agrees and said in line


def test_norms_of_parts_add_up_to_the_whole() -> None:
    """Over any cut of a tensor with elements of very different size: the tolerance is for the order of sums only."""
    values = torch.randn(5_000_000, generator=torch.Generator().manual_seed(0)) * torch.logspace(-12, 3, 5_000_000)
    whole = float(values.double().norm())
    for parts in (1, 2, 3, 7, 1000):
        norm = sum(sum_of_squares(part) for part in values.chunk(parts)) ** 0.5
        assert abs(norm - whole) <= 1e-13 * whole
    assert sum_of_squares(torch.zeros(0)) == 0.0


def test_step(manifest: Manifest) -> None:
    assert compare_step(manifest, "step_00000010", [10, 10]) == (["step 10"], [])
    assert compare_step(manifest, "a-copy", []) == (["step 10"], [])
    skipped = manifest.model_copy(update={"skipped_steps": 3})
    assert compare_step(skipped, "step_00000010", [7])[1] == []
    assert compare_step(manifest, "step_00000011", [10])[1] == ["the folder is step_00000011, the manifest's step 10"]
    assert "group 1 has had 9 updates, but of 10 steps 0" in compare_step(manifest, "step_00000010", [10, 9])[1][0]
    assert "had 10 updates, but of 10 steps 3" in compare_step(skipped, "step_00000010", [10])[1][0]


def test_learning_rate(manifest: Manifest) -> None:
    assert compare_learning_rate(manifest, SCHEDULE, RECIPE)[1] == []
    [line] = compare_learning_rate(with_rate(manifest, SCHEDULE.learning_rate(11)), SCHEDULE, RECIPE)[1]
    assert str(SCHEDULE.learning_rate(11)) in line and str(SCHEDULE.learning_rate(10)) in line
    skipped = manifest.model_copy(update={"skipped_steps": 1})
    assert compare_learning_rate(skipped, SCHEDULE, RECIPE)[1] == [], "the last step was the skipped one"
    assert compare_learning_rate(with_rate(skipped, SCHEDULE.learning_rate(9)), SCHEDULE, RECIPE)[1] == []
    assert compare_learning_rate(with_rate(skipped, SCHEDULE.learning_rate(8)), SCHEDULE, RECIPE)[1] != []
    longer = make_recipe({"train.steps": 30})
    agrees, differs = compare_learning_rate(manifest, Schedule(longer.optimizer, 30), longer)
    assert differs == [] and "changed" in agrees[0]
    other_micro_batch = make_recipe({"train.steps": 20, "train.micro_batch_sequences": 4})
    assert "rate" in compare_learning_rate(manifest, SCHEDULE, other_micro_batch)[0][0]


def test_position(manifest: Manifest) -> None:
    assert manifest.probe is not None
    recorded = manifest.probe.input_ids

    class Stream:
        """Has the probe's row at position 80 and another elsewhere."""

        def rows(self, positions: range) -> Any:
            assert len(positions) == 1
            row = recorded if positions.start == 80 else recorded[::-1]
            return SimpleNamespace(input_ids=np.array([row]))

    assert compare_position(manifest, RECIPE, Stream()) == (["data at sample 80"], [])
    lines = compare_position(manifest.model_copy(update={"samples_consumed": 81}), RECIPE, Stream())[1]
    assert "is at sample 81, but step 10 at 80" in lines[0] and "the data at sample 81 begins with" in lines[1]
    [line] = compare_position(manifest.model_copy(update={"tokens": 2561}), RECIPE, Stream())[1]
    assert "has 2561 tokens, but step 10 has 2560" in line
    assert len(compare_position(manifest.model_copy(update={"samples_consumed": -1}), RECIPE, Stream())[1]) == 1


def test_probe_holds_logits_and_loss() -> None:
    torch.manual_seed(0)
    table = torch.randn(50, 64)
    ids, positions = torch.arange(20)[None], torch.arange(20)[None]
    mask = torch.arange(20)[None] > 3

    def replay(table: torch.Tensor, **changes: Any) -> tuple[str, bool]:
        probe = make_probe(recorded[ids], MicroBatch(ids, ids + 1, positions, mask), None)
        assert probe is not None
        return check_probe(
            lambda ids, _: table[ids], probe.model_copy(update=changes), torch.device("cpu"), torch.float32
        )

    recorded = table
    line, passed = replay(table)
    assert passed and "logits within 0 " in line
    assert replay(table * (1 + 1e-6))[1] and not replay(table * 1.001)[1] and not replay(table * math.nan)[1]
    # logits beyond the recorded ones: the smallest of 64 is in no list of the 32 largest, but every loss depends on it
    smallest = table.scatter(1, table.argmin(1, keepdim=True), 2.0)
    line, passed = replay(smallest)
    assert "logits within 0 " in line and not passed
    assert not replay(table, loss=1.0)[1]
