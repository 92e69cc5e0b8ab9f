"""A fault planted in the ranks of a run: its tests set PLANTED_FAULT in the environment to the arguments of `plant`, as
JSON, and forked ranks follow it. The product knows nothing of it."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

import gpt.run_model
from data_pipeline.stream import TrainingStream

MODULE = "model.layers.1.mlp"


@contextmanager
def planted(kind: str, samples: list[int]) -> Iterator[None]:
    """Runs that begin meanwhile have the fault: `kind` is "nan" (the output of MODULE) or "spike" (the logits are
    turned round), `samples` the positions in the data order at which it happens, in training."""
    with mock.patch.dict(os.environ, PLANTED_FAULT=json.dumps({"kind": kind, "samples": samples})):
        yield


def plant(kind: str, samples: list[int]) -> None:
    """Change the model that this process builds: sequences from the planted positions are known by their content."""
    plain_rows, plain_build = TrainingStream.rows, gpt.run_model.build_model
    chosen = set(samples)
    marked: set[bytes] = set()

    def rows(self: TrainingStream, positions: range) -> Any:
        result = plain_rows(self, positions)
        marked.update(result.input_ids[p - positions.start].tobytes() for p in positions if p in chosen)
        return result

    def build_model(*arguments: Any) -> Any:
        model = plain_build(*arguments)
        hit = [False]

        def look(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
            hit[0] = module.training and any(row.numpy().tobytes() in marked for row in kwargs["input_ids"])

        def spoil(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
            return output * float("nan") if hit[0] else None

        def turn(module: torch.nn.Module, args: Any) -> Any:
            return (args[0] * -3,) if hit[0] else None

        model.register_forward_pre_hook(look, with_kwargs=True)
        if kind == "nan":
            model.get_submodule(MODULE).register_forward_hook(spoil)
        else:
            model.get_submodule("lm_head").register_forward_pre_hook(turn)
        return model

    TrainingStream.rows = rows  # type: ignore[method-assign]
    gpt.run_model.build_model = build_model
