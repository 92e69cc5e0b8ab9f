"""Text that is generated while a run trains at ZeRO stage 3: no rank waits for one whose text ended before its own."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from live_runs import environment

WORKER = Path(__file__).with_name("lock_step_worker.py")


@pytest.mark.parametrize("cases", [pytest.param(20, marks=pytest.mark.few), pytest.param(200, marks=pytest.mark.full)])
def test_uneven_prompts_and_early_ends_neither_hang_nor_change_the_text(tmp_path: Path, cases: int) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    started = {}
    for ranks in (1, 2):
        command = [*torchrun, f"--nproc-per-node={ranks}", str(WORKER), str(tmp_path / f"{ranks}.json"), str(cases)]
        started[ranks] = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        for process in started.values():
            errors = process.communicate(timeout=60 + cases)[1]
            assert process.returncode == 0, errors
    finally:
        for process in started.values():
            process.terminate()
    alone, together = (json.loads((tmp_path / f"{ranks}.json").read_text("utf-8")) for ranks in (1, 2))
    losses = [np.array([[loss for loss, *_ in case] for case in found]) for found in (alone, together)]
    np.testing.assert_allclose(*losses, rtol=1e-6)
    texts, others = ([[text for _, *text in case] for case in found] for found in (alone, together))
    assert texts == others and len(texts) == cases
    uneven = sum(len(first[1]) != len(second[1]) for first, second in texts)
    assert uneven > cases // 3  # else the cases would not try it
