"""The command line: exit codes, one-sentence errors, help, pure JSON."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launch import cli, console

COMMANDS = ("prepare", "verify", "train", "submit", "evaluate", "export", "generate", "chat", "serve")


def trainyard(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from launch.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | variables, timeout=60)


@pytest.mark.parametrize(
    "arguments",
    [
        ("nothing",),
        ("train",),
        ("export", "runs/x"),
        ("train", "x.yaml", "--nodes", "two"),
        ("generate", "m"),
        ("generate", "m", "--prompt", "x", "--prompts", "f", "--out", "o"),
        ("generate", "m", "--prompts", "f"),
        ("generate", "m", "--prompt", "x", "--batch-size", "2"),
        ("evaluate", "m"),
        ("evaluate", "m", "--data", "d", "--task", "t"),
        ("evaluate", "m", "--data", "d", "--predictions", "p"),
        ("evaluate", "m", "--task", "t", "--sequences", "1"),
        ("evaluate", "m", "--data", "d", "--baseline", "b"),
        ("export", "runs/x", "--out", "o", "--best", "--step", "3"),
    ],
)
def test_wrong_arguments_are_exit_code_2(arguments: tuple[str, ...]) -> None:
    done = trainyard(*arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_bad_input_is_one_sentence_and_exit_code_1() -> None:
    done = trainyard("train", "absent.yaml")
    assert done.returncode == 1
    assert done.stderr.startswith("trainyard: error: recipe absent.yaml does not exist")
    assert len(done.stderr.splitlines()) == 1


def test_debug_shows_the_traceback() -> None:
    done = trainyard("train", "absent.yaml", TRAINYARD_DEBUG="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "FileNotFoundError: recipe absent.yaml" in done.stderr


def test_a_bug_is_not_dressed_up_as_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise TypeError("a bug")

    monkeypatch.setattr("gpt.recipe_file.load_recipe", broken)
    monkeypatch.setattr(sys, "argv", ["trainyard", "train", "x.yaml"])
    with pytest.raises(TypeError, match="a bug"):
        cli.main()


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str) -> None:
    result = CliRunner().invoke(cli.app, [command, "--help"])
    assert result.exit_code == 0
    assert f"Example: trainyard {command} " in " ".join(result.output.split())


def test_help_lists_every_command_and_loads_nothing_slow() -> None:
    code = (
        "import sys; from launch.cli import app; app(['--help'], standalone_mode=False); "
        "print('slow:', {'torch', 'transformers', 'pandas', 'deepspeed', 'pyarrow'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert [command for command in COMMANDS if command not in done.stdout] == []
    assert done.stdout.endswith("slow: set()\n")


def test_json_gets_stdout_for_itself(capfd: pytest.CaptureFixture[str]) -> None:
    with console.answering(as_json=True) as answer:
        print("a library prints")
        os.write(1, b"native code prints\n")
        answer({"name": "größe", "values": [1, 2.5, None]})
    out, err = capfd.readouterr()
    assert json.loads(out) == {"name": "größe", "values": [1, 2.5, None]}
    assert "a library prints" in err
    assert "native code prints" in err


def test_json_prints_nothing_when_the_command_fails(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="refused"), console.answering(as_json=True):
        raise ValueError("refused")
    print("afterwards")
    assert capfd.readouterr().out == "afterwards\n"


def test_prepare_with_json(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for number in range(8):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"Text number {number} of a small corpus. " * 20, "utf-8")
    arguments = [
        "prepare",
        "--input",
        str(tmp_path / "texts"),
        "--train-tokenizer",
        "280",
        "--validation-fraction",
        "0",
    ]
    done = trainyard(*arguments, "--out", str(tmp_path / "out"), "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer.pop("run").keys() == {"engine", "units_made", "seconds"}
    assert answer == json.loads((tmp_path / "out" / "report.json").read_text("utf-8")) | {"reused": False}
    plain = trainyard(*arguments, "--out", str(tmp_path / "out"))
    assert plain.returncode == 0, plain.stderr
    assert "splits.train.documents: 8\n" in plain.stdout
    assert "reused: True\n" in plain.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_train_is_stopped_before_its_workers_start(number: signal.Signals) -> None:
    code = (
        "import time, gpt.recipe_file; from launch.cli import main;"
        "gpt.recipe_file.load_recipe = lambda *_: (print('loading', flush=True), time.sleep(60)); main()"
    )
    command = [sys.executable, "-c", code, "train", "x.yaml"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"
    process.send_signal(number)
    assert process.communicate(timeout=60)[1].endswith("stopped before the workers were started\n")
    assert process.returncode == 85
