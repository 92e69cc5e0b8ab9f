"""Compiled layers compute what plain ones do, and the next start finds them compiled."""

from pathlib import Path

import pytest
from live_runs import Runs


@pytest.mark.full
def test_compiled_layers_give_the_plain_losses_and_are_kept(
    reference: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    steps = {"global_batch_tokens": 512, "micro_batch_sequences": 2, "seed": 3}
    reference.train("compiled", compile=True, train=steps | {"steps": 20})
    plain = reference.metrics("reference")
    for step, record in reference.metrics("compiled").items():
        assert record["train/loss"] == pytest.approx(plain[step]["train/loss"], abs=2e-2), f"step {step}"
    kernels = sorted(tmp_path.rglob("*.so"))
    assert kernels, "nothing was compiled, so that nothing was compared"
    reference.train("compiled", compile=True, train=steps | {"steps": 22})
    assert reference.metrics("compiled")[22] and sorted(tmp_path.rglob("*.so")) == kernels
