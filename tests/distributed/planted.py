"""`trainyard` with a fault planted: python planted.py COMMAND …, the environment variable PLANT says what and where.

PLANT is JSON: `kind` is "nan" (the output of MODULE) or "spike" (the logits are turned round), `samples` the positions
in the data order at which it happens, in training. Its ranks are this same file: the product knows nothing of it.
"""

import json
import os
import runpy
from typing import Any

import torch

MODULE = "model.layers.1.mlp"


def plant(kind: str, samples: set[int]) -> None:
    """Change the model that `gpt.train` builds: sequences that came from the planted positions are known by content."""
    import gpt.model
    from data_pipeline.stream import TrainingStream

    plain_rows, plain_build = TrainingStream.rows, gpt.model.build_model
    marked: set[bytes] = set()

    def rows(self: TrainingStream, positions: range) -> Any:
        result = plain_rows(self, positions)
        marked.update(result.input_ids[p - positions.start].tobytes() for p in positions if p in samples)
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
    gpt.model.build_model = build_model


if __name__ == "__main__":
    if "RANK" in os.environ:
        content = json.loads(os.environ["PLANT"])
        plant(content["kind"], set(content["samples"]))
        runpy.run_module("gpt.train", run_name="__main__")
    else:
        import launch.local
        from launch.cli import main

        launch.local.WORKER_MODULE = "planted"
        main()
