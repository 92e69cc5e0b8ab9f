"""README.md says what is true: recipe reference, example, tags, files, dependencies and options."""

import ast
import dataclasses
import re
import shlex
import subprocess
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import recipe_reference
import typer.main
import yaml
from transformers import TrainingArguments

from data_pipeline.templates import parse_template
from gpt.recipe import Recipe, Section
from gpt.recipe_file import parse_recipe, parse_section
from gpt.task import KINDS
from launch.cli import app

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text("utf-8")
TAG = re.compile(r"[A-Za-z]\w*(/[\w-]+)+")


def section(title: str) -> str:
    """The text below a heading, up to the next of the same level."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE)
    assert found, title
    return found.group(1)


def first_column(text: str) -> list[str]:
    """The code in the first column of a section's tables."""
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


def code_blocks(text: str, language: str = "") -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [content for kind, content in blocks if kind == language]


def tracked_files() -> list[str]:
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


# recipe reference


@pytest.mark.parametrize("name", recipe_reference.ROOTS)
def test_the_references_are_up_to_date(name: str) -> None:
    assert recipe_reference.replace_section(README, recipe_reference.reference(name), name) == README, (
        "run: python tests/unit/recipe_reference.py --write"
    )


def test_the_fields_of_transformers_and_their_recipe_fields_exist() -> None:
    rows = re.findall(r"^\| `(\w+)`( \(4\))? \| (.*?) \|", section("Coming from transformers' Trainer"), re.MULTILINE)
    theirs = [name for name, *_ in rows if name != "TrainingArguments"]
    assert len(theirs) == len(set(theirs)) > 35
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert [name for name, old, _ in rows[1:] if (name in known) == bool(old)] == []
    ours = [name for *_, fields in rows[1:] for name in re.findall(r"`([^`]+)`", fields)]
    assert sorted(set(ours) - set(first_column(recipe_reference.reference()))) == []


def test_the_reference_has_a_row_for_every_field() -> None:
    rows = first_column(recipe_reference.reference())
    known = ["name", "model", "model.config", "data.train[].weight", "gradient_checkpointing.every_layers"]
    assert [name for name in (*Recipe.model_fields, *known) if name not in rows] == []
    assert len(rows) == len(set(rows))


@pytest.mark.parametrize(
    ("field", "values", "default"),
    [
        ("train.tokens", "whole number > 0 or null", "`null`"),
        ("optimizer.betas", "list of 2: number ≥ 0, < 1", "`[0.9, 0.95]`"),
        ("compile", "`auto` or `true` or `false`", "`auto`"),
        ("data.train", "list of 1 or more: section", "required"),
        ("gradient_checkpointing", "section or null", "`null`"),
    ],
)
def test_values_and_defaults_of_the_reference(field: str, values: str, default: str) -> None:
    assert f"| `{field}` | {values} | {default} |" in recipe_reference.reference()


def test_a_field_without_a_docstring_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Undocumented(Section):
        described: int = 1
        """This one is."""
        silent: int = 1

    monkeypatch.setitem(recipe_reference.ROOTS, "recipe", Undocumented)
    with pytest.raises(ValueError, match="without a docstring: silent;"):
        recipe_reference.reference()


def test_a_text_without_markers_is_refused() -> None:
    begin, end = recipe_reference.BEGIN.format("recipe"), recipe_reference.END.format("recipe")
    assert recipe_reference.replace_section(f"a\n{begin}\nold\n{end}\nb", "new") == f"a\n{begin}\nnew\n{end}\nb"
    for text in (begin, end, f"{end}\n{begin}", f"{begin}{end}{end}"):
        with pytest.raises(ValueError, match="once each"):
            recipe_reference.replace_section(text, "new")


# the worked example


def test_the_tasks_of_the_examples_are_valid() -> None:
    contents = [yaml.safe_load(block) for block in code_blocks(section("Answers and scores"), "yaml")]
    tasks = [parse_section(KINDS[content["kind"]], content, "of README.md") for content in contents]
    assert [task.kind for task in tasks] == ["multiple_choice", "classification"]
    assert tasks[0].prompt == "Question: {question}\nAnswer:"


def test_the_template_of_the_example_is_valid() -> None:
    [block] = code_blocks(section("Tasks from tables"), "yaml")
    assert parse_template("of README.md", yaml.safe_load(block)).response == "{de}"


def test_the_recipe_of_the_example_is_valid() -> None:
    [block] = code_blocks(section("Your own CSV"), "yaml")
    recipe = parse_recipe(yaml.safe_load(block), "of README.md")
    assert recipe.optimizer.learning_rate == 2e-3
    assert recipe.global_batch_sequences == 32


def commands() -> list[list[str]]:
    """Every command line of the README that calls trainyard, as words; [ ] and comments taken away."""
    lines = re.findall(r"^(?:    |\$ )(trainyard .*)$", README, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def test_the_commands_of_the_readme_exist_with_these_options() -> None:
    known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    found = commands()
    assert len(found) >= 6
    for words in found:
        options = {name for parameter in known[words[1]].params for name in parameter.opts}
        assert [word for word in words if word.startswith("--") and word not in options] == [], words
    named = re.match(r"\s*((?:`\w+`,? ?)+):", section("Commands and exit codes"))
    assert named and sorted(re.findall(r"`(\w+)`", named.group(1))) == sorted(known)


# tags


def tags_of(source: str) -> set[str]:
    """What a module writes to TensorBoard: string constants with the form of a tag, and names of texts."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and TAG.fullmatch(node.value):
            found.add(node.value)
        if isinstance(node, ast.JoinedStr) and re.match(r"f.\w+/", text := ast.unparse(node)):
            found.add(text)  # a tag put together at run time cannot be documented: this makes the comparison fail
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("write_text", "add_scalar", "add_text")):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and "." not in str(first.value):
                found.add(str(first.value))
    return found


def test_the_table_of_tags_is_that_of_the_code() -> None:
    written = set().union(*(tags_of(file.read_text("utf-8")) for file in (ROOT / "gpt").glob("*.py")))
    assert {"train/loss", "evaluate/bits_per_byte", "memory/host_gib", "evaluate/sample", "recipe"} <= written
    documented = first_column(section("TensorBoard"))
    assert sorted(documented) == sorted(written)


def test_a_new_tag_is_seen_wherever_it_is_written() -> None:
    source = 'r = {"a/b_c": 1}\nr["d/e"] = 2\nboard.add_scalar("f/g", 3, 0)\nm.write_text("notes", t, 0)\nx = "a/b.c"'
    assert tags_of(source) == {"a/b_c", "d/e", "f/g", "notes"}
    assert tags_of('r[f"train/{name}"] = 1') != set()


def test_every_tag_has_unit_healthy_range_and_advice() -> None:
    rows = re.findall(r"^\| `[^`]+` \|.*$", section("TensorBoard"), re.MULTILINE)
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 4 and all(cells), row


# files and dependencies


def tree() -> list[str]:
    """The paths of the file tree, folders without their slash."""
    [block] = code_blocks(section("Files"))
    paths: list[str] = []
    parents: list[tuple[int, str]] = []
    for line in block.splitlines():
        indent, name = len(line) - len(line.lstrip()), line.split()[0]
        assert len(line.split(maxsplit=1)) == 2 or name.endswith("/"), f"no words about {name}"
        parents = [parent for parent in parents if parent[0] < indent]
        path = (parents[-1][1] if parents else "") + name
        paths.append(path.removesuffix("/"))
        if name.endswith("/"):
            parents.append((indent, path))
    return paths


def test_every_file_of_the_product_is_in_the_tree() -> None:
    folders = ("launch/", "gpt/", "data_pipeline/", "ds_configs/", "slurm/")
    product = [file for file in tracked_files() if file.startswith(folders) or fnmatchcase(file, "tests/*.sh")]
    assert len(product) > 40
    shown = tree()
    missing = [f for f in product if not f.endswith("__init__.py") and not any(fnmatchcase(f, path) for path in shown)]
    assert missing == []


def test_the_tree_names_nothing_that_does_not_exist() -> None:
    shown = tree()
    assert len(shown) == len(set(shown))
    assert [path for path in shown if not any(True for _ in ROOT.glob(path))] == []


def test_packages_hold_nothing_but_their_description() -> None:
    for package in (file for file in tracked_files() if file.endswith("__init__.py") and not file.startswith("tests/")):
        body = ast.parse((ROOT / package).read_text("utf-8")).body
        assert len(body) == 1 and isinstance(body[0], ast.Expr), package


def test_every_dependency_has_its_row() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    wanted = [*project["dependencies"], *(d for extra in project["optional-dependencies"].values() for d in extra)]
    names = [re.split(r"[<>=!~\[; ]", requirement)[0] for requirement in wanted]
    assert sorted(first_column(section("Dependencies"))) == sorted(names)


def test_links_and_paths_lead_somewhere() -> None:
    titles = {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in re.findall(r"^## (.+)$", README, re.M)}
    targets = re.findall(r"\]\(([^)]+)\)", README)
    assert len(targets) >= 5
    for target in targets:
        assert target[1:] in titles if target.startswith("#") else (ROOT / target).is_file(), target
