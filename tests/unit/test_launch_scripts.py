"""The shell scripts: what they check before they install, what they skip, what the job script starts."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = (
    "launch/install.sh",
    "launch/quickstart.sh",
    "tests/run.sh",
    ".ci/run",
    "slurm/prepare_array.sbatch",
)


def executable(file: Path, content: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)
    file.chmod(0o755)


def bash(code: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {
        key: value for key, value in os.environ.items() if key not in ("CXX", "TRAINYARD_PYTHON")
    } | variables
    return subprocess.run(["bash", "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_valid_bash(script: str) -> None:
    done = subprocess.run(["bash", "-n", str(ROOT / script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose Python notes its arguments instead of installing."""
    for name in ("pyproject.toml", "constraints.txt", "launch/install.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    executable(
        tmp_path / "bin" / "python",
        """#!/bin/bash
        case "$*" in
          *get_path*) echo "$HEADERS" ;;
          *sys.version_info*) exit "${TOO_OLD:-0}" ;;
          "-m venv "*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
          *compileall*) ;;
          *) echo "$@" >> installed.txt
             [[ "$*" == *"${FAILS:-nothing}"* ]] && exit 1
             touch .venv/bin/trainyard; chmod +x .venv/bin/trainyard ;;
        esac
        """,
    )
    (tmp_path / "headers").mkdir()
    (tmp_path / "headers" / "Python.h").touch()
    return tmp_path


def install(checkout: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    defaults = {"TRAINYARD_PYTHON": str(checkout / "bin" / "python"), "HEADERS": str(checkout / "headers")}
    return bash("set -euo pipefail; . launch/install.sh; install_trainyard", checkout, **(defaults | variables))


def test_installs_the_tested_versions_once(checkout: Path) -> None:
    assert install(checkout).returncode == 0
    assert install(checkout).returncode == 0
    arguments = (checkout / "installed.txt").read_text().splitlines()
    fast = "--only-binary gigatoken,tiktoken,awkward-cpp --editable .[test,lint,serve,language,remote,fast]"
    assert arguments == [f"-m pip install --quiet --constraint constraints.txt {fast}", "-m launch.prebuild"]
    with (checkout / "constraints.txt").open("a") as file:
        file.write("another==1\n")
    assert install(checkout).returncode == 0
    assert len((checkout / "installed.txt").read_text().splitlines()) == 4


def test_without_wheels_of_the_fast_engines_the_rest_is_installed(checkout: Path) -> None:
    done = install(checkout, FAILS=",fast]")
    assert done.returncode == 0
    assert "fast tokenizer engines cannot be installed here" in done.stderr
    *_, last, _ = (checkout / "installed.txt").read_text().splitlines()
    assert last == "-m pip install --quiet --constraint constraints.txt --editable .[test,lint,serve,language,remote]"
    assert (checkout / ".venv" / "trainyard-installed").is_file()
    assert install(checkout, FAILS=".[test,lint,serve").returncode == 0  # nothing to do
    (checkout / ".venv" / "trainyard-installed").unlink()
    assert install(checkout, FAILS=".[test,lint,serve").returncode != 0
    assert not (checkout / ".venv" / "trainyard-installed").exists()


def test_an_extension_that_cannot_be_compiled_is_no_installation(checkout: Path) -> None:
    done = install(checkout, FAILS="launch.prebuild")
    assert done.returncode == 1 and "DeepSpeed's extension cannot be compiled" in done.stderr
    assert not (checkout / ".venv" / "trainyard-installed").exists()


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({"TOO_OLD": "1"}, "no Python 3.11 or newer with venv found (tried"),
        ({"TRAINYARD_PYTHON": "absent-python"}, "no Python 3.11 or newer with venv found (tried absent-python)"),
        ({"CXX": "absent-compiler"}, "no C++ compiler found (CXX is absent-compiler)"),
        ({"HEADERS": "/absent"}, "has no header files (/absent/Python.h is missing)"),
    ],
)
def test_what_is_missing_is_said_before_anything_is_installed(
    checkout: Path, variables: dict[str, str], sentence: str
) -> None:
    done = install(checkout, **variables)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("trainyard: error: ")
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (checkout / ".venv").exists()
    assert not (checkout / "installed.txt").exists()


def test_every_pinned_version_is_exact_and_runs_here() -> None:
    from importlib.metadata import version

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert len(pins) == len(lines) > 50
    for name in ("torch", "deepspeed", "transformers", "tokenizers", "datasets", "accelerate", "tensorboard"):
        assert version(name).partition("+")[0] == pins[name]


def test_array_script_gives_each_task_its_share(tmp_path: Path) -> None:
    executable(tmp_path / ".venv" / "bin" / "trainyard", '#!/bin/bash\nprintf "[%s]" "$@"; echo\n')
    script = ROOT / "slurm" / "prepare_array.sbatch"
    variables = {
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_ARRAY_TASK_MIN": "1",
        "SLURM_ARRAY_TASK_MAX": "4",
        "SLURM_ARRAY_TASK_COUNT": "4",
    }
    done = bash(f"bash {script} --input 'a b/*.jsonl' --out 'x $(id)'", tmp_path, **variables)
    assert (done.returncode, done.stdout) == (0, "[prepare][--input][a b/*.jsonl][--out][x $(id)][--task][2/4]\n")
    for code, changes, sentence in (
        (f"bash {script}", {}, "nothing to prepare"),
        (f"bash {script} --input a", {"SLURM_ARRAY_TASK_COUNT": "3"}, "an array with gaps"),
    ):
        refused = bash(code, tmp_path, **(variables | changes))
        assert refused.returncode == 2
        assert sentence in refused.stderr
        assert refused.stdout == ""


def test_array_script_options_are_ones_that_sbatch_takes_as_they_are() -> None:
    lines = (ROOT / "slurm" / "prepare_array.sbatch").read_text().splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH")]
    assert len(options) > 3
    assert [option for option in options if not option.startswith("--") or "$" in option] == []
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first_command:])  # sbatch stops reading there
