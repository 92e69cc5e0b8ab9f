"""Reading a recipe file, or another YAML file of sections: overrides, all problems in one message, absolute paths."""

import difflib
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from gpt.recipe import Recipe

PROJECT_ROOT = Path(__file__).resolve().parents[1]
"""The checkout: shipped recipes and DeepSpeed files are found here from any working directory."""

AnySection = TypeVar("AnySection", bound=BaseModel)
HUB_PREFIX = "hf://"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that a mapping has twice: YAML would silently ignore the first one."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value} is there twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return node


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, apply `key=value` overrides, check it and make its paths absolute.

    Raises:
        FileNotFoundError: the file is neither below the working directory nor shipped with Trainyard.
        ValueError: not YAML, or any number of problems, all in one message.
    """
    file = find_shipped_file(str(path))
    if not file.is_file():
        shipped = sorted(p.name for p in (PROJECT_ROOT / "launch" / "recipes").glob("*.yaml"))
        raise FileNotFoundError(f"recipe {path} does not exist; shipped in launch/recipes: {', '.join(shipped)}")
    content = read_mapping(file)
    for override in overrides:
        _apply_override(content, override)
    return resolve_paths(parse_recipe(content, str(path)))


def read_mapping(file: Path, kind: str = "recipe") -> dict[str, Any]:
    """The keys and values of a YAML file, not yet checked. Raises ValueError when it is not YAML or no mapping."""
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{kind} {file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{kind} {file} holds {type(content).__name__}, not a mapping of keys to values")
    return content


def parse_recipe(content: dict[str, Any], where: str) -> Recipe:
    """Check a recipe's content; `where` names it in the error, which lists all problems."""
    return parse_section(Recipe, content, f"recipe {where}")


def parse_section(section: type[AnySection], content: dict[str, Any], what: str) -> AnySection:
    """Check the content of a file whose keys are `section`'s; `what` begins the error, which lists all problems."""
    try:
        return section.model_validate(content)
    except ValidationError as error:
        problems = [_describe(problem, section) for problem in error.errors()]
        raise ValueError(f"{what}: " + "; ".join(dict.fromkeys(problems))) from None


def load_section(section: type[AnySection], path: str, kind: str) -> AnySection:
    """A YAML file of `section`'s keys, here or shipped. Raises FileNotFoundError, or ValueError with all problems."""
    file = find_shipped_file(path)
    if not file.is_file():
        raise FileNotFoundError(f"{kind} file {path} does not exist")
    return parse_section(section, read_mapping(file, kind), f"{kind} {path}")


def find_shipped_file(path: str) -> Path:
    """`path` below the working directory, else below the checkout (shipped recipes, DeepSpeed files)."""
    here = Path(path).expanduser().absolute()
    return PROJECT_ROOT / path if not here.exists() and (PROJECT_ROOT / path).exists() else here


def resolve_paths(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths; URLs and hub ids (`organisation/name` that is no path here) stay as they are."""

    def local(path: str) -> str:
        return str(Path(path).expanduser().absolute())

    def local_or_url(path: str) -> str:
        return path if "://" in path else local(path)

    def local_or_hub(path: str) -> str:
        path = path.removeprefix(HUB_PREFIX)
        return path if HUB_ID.fullmatch(path) and not Path(path).exists() else local(path)

    content = recipe.model_dump()
    content["runs_directory"] = local(recipe.runs_directory)
    if not recipe.tokenizer.startswith(HUB_PREFIX):
        content["tokenizer"] = local(recipe.tokenizer)
    if recipe.model.pretrained is not None:
        content["model"]["pretrained"] = local_or_hub(recipe.model.pretrained)
    for source in content["data"]["train"]:
        source["path"] = local_or_url(source["path"])
    if recipe.data.validation is not None:
        content["data"]["validation"] = local_or_url(recipe.data.validation)
    if recipe.data.remote.cache_directory is not None:
        content["data"]["remote"]["cache_directory"] = local(recipe.data.remote.cache_directory)
    content["deepspeed"] = str(find_shipped_file(recipe.deepspeed))
    return Recipe.model_validate(content)


def fork_recipe(recipe: Recipe, new_name: str) -> Recipe:
    """The same recipe under a new name that starts at step 0 from the weights of this run's newest checkpoint."""
    content = recipe.model_dump()
    content |= {"name": new_name, "model": {"pretrained": str(recipe.run_directory()), "frozen": recipe.model.frozen}}
    if new_name == recipe.name:
        raise ValueError(f"--fork needs a name other than the run's own, {recipe.name}")
    return parse_recipe(content, f"forked as {new_name}")


def _apply_override(content: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"override {override!r} is not key=value, for example optimizer.learning_rate=1e-4")
    *parents, last = key.split(".")
    node: Any = content
    try:
        for part in parents:
            if isinstance(node, list):
                node = node[int(part)]
            else:
                if node.get(part) is None:
                    node[part] = {}
                node = node[part]
        value = yaml.safe_load(text)
        if isinstance(node, list):
            node[int(last)] = value
        else:
            node[last] = value
    except (AttributeError, TypeError, ValueError, IndexError, yaml.YAMLError):
        raise ValueError(f"override {override!r}: the recipe has no place {key}") from None


def _describe(problem: Any, root: type[BaseModel]) -> str:
    """One of pydantic's problems in words; for an unknown key with the nearest known one."""
    where = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = list(_section_at(root, problem["loc"][:-1]).model_fields)
        near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"
        return f"unknown key {where}: {hint}"
    if problem["type"] == "missing":
        return f"{where} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error" and not isinstance(problem["input"], str | int | float):
        return message  # our own validators of whole sections name their fields
    return f"{where}: {message}, got {problem['input']!r}"


def _section_at(section: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    """The section class that a location of pydantic's errors, from `section` on, points into."""
    for part in location:
        if isinstance(part, str) and part in section.model_fields:
            inner = [t for t in _leaf_types(section.model_fields[part].annotation) if issubclass(t, BaseModel)]
            section = inner[0] if inner else section
    return section


def _leaf_types(annotation: Any) -> Iterator[type]:
    if isinstance(annotation, type) and not typing.get_args(annotation):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _leaf_types(argument)
