"""Damaged folders of DeepSpeed's own checkpoints; whole ones, which DeepSpeed wrote, are in tests/distributed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gpt.deepspeed_checkpoint import DeepSpeedWeights


@pytest.mark.parametrize(
    "change",
    [
        {"param_shapes": [{"absent.weight": (2, 2)}]},
        {"param_shapes": [["a.weight"]]},
        {"buffer_names": ["absent"]},
        {"module": None},
    ],
)
def test_files_that_do_not_hold_what_they_name_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    state: dict[str, Any] = {
        "dp_world_size": 1,
        "global_steps": 3,
        "ds_version": "0.19.8",
        "module": {"a.weight": torch.ones(2, 2)},
        "shared_params": {},
        "buffer_names": [],
        "param_shapes": [{"a.weight": torch.Size((2, 2))}],
        "frozen_param_shapes": None,
    }
    optimizer = {"zero_stage": 1, "single_partition_of_fp32_groups": [torch.ones(4)]}
    torch.save({"optimizer_state_dict": optimizer}, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    torch.save(state, tmp_path / "mp_rank_00_model_states.pt")
    assert DeepSpeedWeights(tmp_path, {}).shapes == {"a.weight": (2, 2)}
    torch.save(state | change, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(
        ValueError, match="is damaged, or not of DeepSpeed's save_checkpoint with ZeRO: its files do not"
    ):
        DeepSpeedWeights(tmp_path, {})
