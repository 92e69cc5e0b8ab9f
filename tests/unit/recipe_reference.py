"""The references of README.md, made from the docstrings: of the recipe, each kind of task and the cleaning rules.

`python tests/unit/recipe_reference.py` prints the Markdown; `--write` replaces the section of README.md by it.
"""

import argparse
import json
import types
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from data_pipeline.rules import Rules
from gpt.recipe import Recipe
from gpt.recipe_file import PROJECT_ROOT
from gpt.task import KINDS

BEGIN = "<!-- {} reference: written by `python tests/unit/recipe_reference.py --write` -->"
END = "<!-- end of the {} reference -->"
ROOTS: dict[str, type[BaseModel]] = {"recipe": Recipe, **KINDS, "rules": Rules}
"""What the references are of, by the name in their markers."""
TYPE_NAMES = {int: "whole number", float: "number", bool: "`true` or `false`", str: "text", dict: "mapping"}
BOUNDS = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
"""Attributes of the constraints that pydantic keeps in a field's metadata."""


def reference(name: str = "recipe") -> str:
    """The reference as Markdown: one table row for each field, in the order of the file.

    Raises:
        ValueError: fields without a docstring, all of them named.
    """
    fields = list(_fields(ROOTS[name]))
    if undocumented := [path for path, field in fields if not field.description]:
        raise ValueError(f"{name} fields without a docstring: {', '.join(undocumented)}; write one below each")
    rows = [
        f"| `{path}` | {_values(field)} | {_default(field)} | {_cell(field.description)} |" for path, field in fields
    ]
    return "\n".join(["| field | values | default | meaning |", "| --- | --- | --- | --- |", *rows])


def replace_section(text: str, section: str, name: str = "recipe") -> str:
    """`text` with what stands between the two markers of `name` replaced.

    Raises:
        ValueError: the markers do not stand in `text` once each, the first one first.
    """
    begin, end = BEGIN.format(name), END.format(name)
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end) or text.count(begin) + text.count(end) != 2:
        raise ValueError(f"the text must hold the lines {begin} and {end} once each, in this order: put them back")
    return f"{before}{begin}\n{section}\n{end}{after}"


def _fields(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """(dotted place, field) of every field; a section's own row stands before those of its fields."""
    for name, field in section.model_fields.items():
        place = f"{prefix}{name}"
        yield place, field
        inner = [kind for kind in _kinds(field.annotation) if isinstance(kind, type) and issubclass(kind, BaseModel)]
        for kind in inner:
            yield from _fields(kind, f"{place}[]." if typing.get_origin(field.annotation) is list else f"{place}.")


def _kinds(annotation: Any) -> Iterator[Any]:
    """The types of an annotation, with unions, lists and Annotated opened; a Literal stays whole."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType, list):
        for argument in typing.get_args(annotation):
            yield from _kinds(argument)
    elif origin is typing.Annotated:
        yield from _kinds(typing.get_args(annotation)[0])
    else:
        yield annotation


def _values(field: FieldInfo) -> str:
    """What may be written, with its bounds: "whole number > 0 or null"."""
    names, bounds = [], list(_bounds(field.metadata)) + list(_bounds_inside(field.annotation))
    for kind in _kinds(field.annotation):
        if typing.get_origin(kind) is typing.Literal:
            names += [f"`{json.dumps(value) if isinstance(value, bool) else value}`" for value in typing.get_args(kind)]
        elif kind is types.NoneType:
            names.append("null")
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            names.append("section")
        else:
            name = TYPE_NAMES[typing.get_origin(kind) or kind]
            names.append(" ".join([name, ", ".join(dict.fromkeys(bounds))]).strip())
    values = " or ".join(dict.fromkeys(names))
    if typing.get_origin(field.annotation) is not list:
        return values
    least, most = (_first(field.metadata, name) for name in ("min_length", "max_length"))
    count = least if least is not None and least == most else f"{least or 0} {f'to {most}' if most else 'or more'}"
    return f"list of {count}: {values}"


def _first(metadata: list[Any], name: str) -> int | None:
    return next((value for entry in metadata if (value := getattr(entry, name, None)) is not None), None)


def _bounds(metadata: list[Any]) -> Iterator[str]:
    for entry in metadata:
        for name, sign in BOUNDS.items():
            if (bound := getattr(entry, name, None)) is not None:
                yield f"{sign} {bound}"
        if isinstance(entry, FieldInfo):
            yield from _bounds(entry.metadata)


def _bounds_inside(annotation: Any) -> Iterator[str]:
    """Bounds of the members of a union or list; pydantic lifts only those of the whole field."""
    for argument in typing.get_args(annotation):
        if typing.get_origin(argument) is typing.Annotated:
            yield from _bounds(list(argument.__metadata__))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if field.default_factory is not None:
        return "see right"
    if isinstance(field.default, BaseModel):
        return ""
    return f"`{_plain(field.default)}`"


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def main() -> None:
    """Print the references, or write them into README.md."""
    parser = argparse.ArgumentParser(description="The references, from the docstrings of their models")
    parser.add_argument("--write", action="store_true", help="replace the sections of README.md")
    if not parser.parse_args().write:
        print("\n\n".join(map(reference, ROOTS)))
        return
    file = PROJECT_ROOT / "README.md"
    text = file.read_text(encoding="utf-8")
    for name in ROOTS:
        text = replace_section(text, reference(name), name)
    file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
