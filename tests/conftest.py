"""What every test gets: no network, one thread, no run directory of the user's."""

import os

# Set at import, before any test module can import torch or transformers and read them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.pop("TRAINYARD_RUNS", None)
os.environ.pop("TRAINYARD_DEBUG", None)
