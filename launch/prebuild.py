"""`python -m launch.prebuild`, the end of an installation: compiles what DeepSpeed would compile at the first run."""

import os
import subprocess
import sys
from pathlib import Path

from launch import environment


def main() -> int:
    """Let a process join a process group of its own, as a rank does, in a rank's environment; its exit code."""
    variables = os.environ | environment.worker_environment(processes=1)
    environment.clear_stale_build_locks(Path(variables["TORCH_EXTENSIONS_DIR"]))
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    command = [sys.executable, "-P", "-m", "gpt.distributed"]
    return subprocess.run(command, env=variables | alone, stdout=subprocess.DEVNULL).returncode


if __name__ == "__main__":
    sys.exit(main())
