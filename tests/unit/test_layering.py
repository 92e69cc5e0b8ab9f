"""The import rules of the house, read from the source with ast, so that lazy imports count too."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = ("launch", "gpt", "data_pipeline")


def imported_modules(source: str, package: str) -> set[str]:
    """Every module that a file names: its imports at any depth, and torch.distributed reached as an attribute."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith(("torch.distributed", "deepspeed")):
            found.add(ast.unparse(node))
    return found


def files_of(package: str) -> Iterator[tuple[str, set[str]]]:
    """(module name, modules it names) of every file of a package."""
    for file in sorted((ROOT / package).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts).removesuffix(".__init__"), imported_modules(file.read_text("utf-8"), ".".join(parts[:-1]))


def violations(package: str, forbidden: tuple[str, ...], allowed: tuple[str, ...] = ()) -> list[str]:
    return [
        f"{module} imports {name}"
        for module, names in files_of(package)
        for name in sorted(names)
        if module not in allowed and any(name == f or name.startswith(f + ".") for f in forbidden)
    ]


def test_every_package_is_read() -> None:
    for package in PROJECT:
        assert len(list(files_of(package))) > 3, package


def test_data_pipeline_knows_neither_models_nor_process_groups() -> None:
    assert violations("data_pipeline", ("gpt", "launch", "deepspeed", "torch.distributed")) == []


def test_gpt_does_not_know_launch() -> None:
    assert violations("gpt", ("launch",)) == []


def test_only_the_composition_roots_know_gpt_and_data_pipeline() -> None:
    assert violations("gpt", ("data_pipeline",), allowed=("gpt.train", "gpt.evaluate")) == []


def test_one_owner_of_collectives() -> None:
    assert violations("gpt", ("torch.distributed", "deepspeed"), allowed=("gpt.distributed",)) == []


@pytest.mark.parametrize("module", ["gpt.generate", "gpt.export_gate"])
def test_runs_on_transformers_alone(module: str) -> None:
    names = dict(files_of("gpt"))[module]
    assert [name for name in names if name.partition(".")[0] in PROJECT] == []


def test_nothing_is_loaded_with_code_of_its_own() -> None:
    """transformers asks on the terminal where trust_remote_code is not given, and runs the code where one says yes."""
    calls = []
    for package in PROJECT:
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                text = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
                if text.endswith(".from_pretrained") and "Auto" in text:
                    trust = [ast.unparse(k.value) for k in node.keywords if k.arg == "trust_remote_code"]  # type: ignore[attr-defined]
                    calls.append((f"{file.name}:{node.lineno} {text}", trust))  # type: ignore[attr-defined]
    assert len(calls) > 10
    assert [call for call, trust in calls if trust != ["False"]] == []


def test_help_is_fast_because_the_command_line_imports_nothing_heavy_at_its_top() -> None:
    parts = ("launch.cli", "launch.model_commands", "launch.console")
    for part in parts:
        tree = ast.parse((ROOT / f"{part.replace('.', '/')}.py").read_text("utf-8"))
        top = ast.unparse(ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], []))
        heavy = ("torch", "transformers", "gpt", "data_pipeline", "launch", "rich")
        names = [name for name in imported_modules(top, "launch") if name.partition(".")[0] in heavy]
        assert [name for name in names if not name.startswith(parts) and name != "launch"] == []


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import torch.distributed as dist", "torch.distributed"),
        ("from torch import distributed", "torch.distributed"),
        ("def f():\n    from deepspeed.utils import x", "deepspeed.utils"),
        ("import torch\ntorch.distributed.barrier()", "torch.distributed.barrier"),
        ("from . import trainer", "gpt.trainer"),
        ("from ..trainer import fit", "gpt.trainer.fit"),
    ],
)
def test_the_reader_sees_every_form_of_import(source: str, name: str) -> None:
    package = "gpt.checkpoint" if source.startswith("from ..") else "gpt"
    assert name in imported_modules(source, package)
