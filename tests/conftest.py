"""What every test gets: no network, one thread, no run directory of the user's."""

import os

import pytest

# Set at import, before any test module can import torch or transformers and read them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.pop("TRAINYARD_RUNS", None)
os.environ.pop("TRAINYARD_DEBUG", None)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """torch leaves this in the environment once anything was compiled; to a later test it looks like a user's."""
    os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked gpu are skipped, with the reason, where there is no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this host"))
