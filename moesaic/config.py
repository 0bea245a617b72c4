"""TOML and flags become frozen dataclasses, and what ran is written back with nothing left out.

A config is a frozen dataclass whose fields are str, int, float, bool, Path, a Literal, a tuple or
dict of these, another config (a TOML section), or one of them `| None`. TOML has no null, so
None is written `"none"`, in recipes and flags alike.

    config = build(TrainConfig, merge(load_toml(recipe), {"optimizer": {"lr": 3e-4}}), where=recipe)
    config == build(TrainConfig, tomllib.loads(to_toml(config)), where="the same")

Nothing is adjusted silently: an unknown key, a missing one and a wrong type are each a
`ConfigError` that names the key, the value and what was wanted.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import itertools
import json
import textwrap
import tomllib
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from moesaic.errors import ConfigError, FolderError

Config = TypeVar("Config")

NONE = "none"
"""How None is spelled in TOML and on the command line."""


def load_toml(path: str | Path) -> dict[str, Any]:
    """Read a recipe.

    Raises:
        FolderError: If there is no such file or it cannot be read.
        ConfigError: If it is not TOML; the line and column are named.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise FolderError(f"Cannot read the recipe {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not TOML: it is not UTF-8 text.") from error
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}.") from error


def merge(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """Lay `override` over `base`, section by section; neither is changed."""
    merged = dict(base)
    for key, value in override.items():
        below = merged.get(key)
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            merged[key] = merge(below, value)
        else:
            merged[key] = value
    return merged


def build(cls: type[Config], values: Mapping[str, Any], *, where: str | Path) -> Config:
    """Make a config from nested plain values, checking every one.

    Args:
        cls: A frozen dataclass, see the head of this module.
        values: Keys are field names; sections are mappings.
        where: What the values came from, for messages: a file, or "the command line".

    Raises:
        ConfigError: For an unknown key (the nearest known one is named), a missing key or a
            value of the wrong type, and whatever the dataclass's own checks refuse.
    """
    built = _build_section(cls, values, key="", where=str(where))
    assert isinstance(built, cls), f"{built=}, {cls=}"
    return built


def to_toml(config: object) -> str:
    """Write a config as TOML with every default filled in; `build` gives the same config back."""
    lines = _section_lines(config, "")
    return "\n".join(lines).strip() + "\n"


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """One value of a config, however deeply nested."""

    name: str
    """Dotted: `optimizer.lr`."""

    type: Any
    """Its annotation, resolved."""

    default: Any
    """Its default; `dataclasses.MISSING` if it must be given."""

    doc: str
    """The text below the field, in one line; empty if it has none."""


def leaves(cls: type, prefix: str = "") -> Iterator[Leaf]:
    """Every value of a config in order, sections unfolded; a list of sections is one value."""
    hints = get_type_hints(cls)
    docs = _field_docs(cls)
    for field in _init_fields(cls):
        section = _section_of(hints[field.name])
        if section is not None:
            yield from leaves(section, f"{prefix}{field.name}.")
        else:
            yield Leaf(
                name=prefix + field.name,
                type=hints[field.name],
                default=_default_of(field),
                doc=docs.get(field.name, ""),
            )


def _init_fields(cls: type) -> list[dataclasses.Field[Any]]:
    assert dataclasses.is_dataclass(cls), f"{cls} is no dataclass"
    return [field for field in dataclasses.fields(cls) if field.init]


def _default_of(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _field_docs(cls: type) -> dict[str, str]:
    """The string that stands below each field in the class's source."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        try:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        except (OSError, TypeError, SyntaxError):
            continue
        statements = body.body if isinstance(body, ast.ClassDef) else []
        for field, below in itertools.pairwise(statements):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
                and isinstance(below.value.value, str)
            ):
                docs[field.target.id] = " ".join(below.value.value.split())
    return docs


def _section_of(wanted: Any) -> type | None:
    """The config class of a field that is a section, `| None` or not."""
    members = [arg for arg in _members(wanted) if arg is not types.NoneType]
    if len(members) == 1 and dataclasses.is_dataclass(members[0]):
        assert isinstance(members[0], type)
        return members[0]
    return None


def _members(wanted: Any) -> tuple[Any, ...]:
    if get_origin(wanted) in (Union, types.UnionType):
        return get_args(wanted)
    return (wanted,)


def _build_section(cls: type, values: Mapping[str, Any], *, key: str, where: str) -> object:
    hints = get_type_hints(cls)
    fields = {field.name: field for field in _init_fields(cls)}
    prefix = f"{key}." if key else ""
    for name in values:
        if name not in fields:
            raise ConfigError(_unknown_key(name, list(fields), prefix=prefix, where=where))
    arguments = {}
    for name, field in fields.items():
        if name in values:
            arguments[name] = _convert(hints[name], values[name], key=prefix + name, where=where)
        elif _default_of(field) is dataclasses.MISSING:
            raise ConfigError(
                f"{where}: {prefix}{name} is missing. It must be {describe(hints[name])}."
            )
    section: object = cls(**arguments)
    return section


def _unknown_key(name: str, known: list[str], *, prefix: str, where: str) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = (
        f"Did you mean {prefix}{near[0]}?"
        if near
        else f"Known are {', '.join(prefix + other for other in known)}."
    )
    return f"{where}: unknown key {prefix}{name}. {hint}"


def _convert(wanted: Any, value: Any, *, key: str, where: str) -> Any:
    if type(value) is int and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{where}: {key} is {_show(value)}, but whole numbers have 64 bits.")
    section = _section_of(wanted)
    if section is not None and isinstance(value, Mapping):
        return _build_section(section, value, key=key, where=where)
    members = _members(wanted)
    if types.NoneType in members and (value is None or value == NONE):
        return None
    for member in members:
        try:
            return _convert_one(member, value, key=key, where=where)
        except _WrongType:
            continue
    raise ConfigError(f"{where}: {key} is {_show(value)}, but must be {describe(wanted)}.")


class _WrongType(Exception):
    """A value does not fit one member of a union; another may still take it."""


def _convert_one(wanted: Any, value: Any, *, key: str, where: str) -> Any:
    origin = get_origin(wanted)
    if wanted is Any:
        return value
    if origin is Literal:
        for choice in get_args(wanted):
            if type(choice) is type(value) and choice == value:
                return choice
    elif origin is tuple and isinstance(value, list | tuple):
        return _convert_tuple(get_args(wanted), value, key=key, where=where)
    elif origin in (dict, Mapping) and isinstance(value, Mapping):
        inner = get_args(wanted)[1]
        return {
            str(name): _convert(inner, item, key=f"{key}.{name}", where=where)
            for name, item in value.items()
        }
    elif wanted is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    elif wanted is Path and isinstance(value, str | Path) and str(value):
        return Path(value)
    elif wanted in (str, int, bool) and type(value) is wanted:
        return value
    raise _WrongType


def _convert_tuple(inner: tuple[Any, ...], value: Any, *, key: str, where: str) -> tuple[Any, ...]:
    if len(inner) == 2 and inner[1] is Ellipsis:
        inner = (inner[0],) * len(value)
    if len(inner) != len(value):
        raise _WrongType
    return tuple(
        _convert(item_type, item, key=f"{key}[{index}]", where=where)
        for index, (item_type, item) in enumerate(zip(inner, value, strict=True))
    )


NAMES = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    Path: "a path",
    types.NoneType: f'"{NONE}"',
    Any: "any value",
}


def describe(wanted: Any) -> str:
    """Say in words what a field of this type takes."""
    members = _members(wanted)
    if len(members) > 1:
        return " or ".join(describe(member) for member in members)
    origin, inner = get_origin(wanted), get_args(wanted)
    if origin is Literal:
        return "one of " + ", ".join(_show(choice) for choice in inner)
    if origin is tuple and len(inner) == 2 and inner[1] is Ellipsis:
        return f"a list, each item {describe(inner[0])}"
    if origin is tuple:
        return f"a list of {len(inner)}: {', '.join(describe(item) for item in inner)}"
    if origin in (dict, Mapping):
        return f"a table, each value {describe(inner[1])}"
    if dataclasses.is_dataclass(wanted):
        return "a section with " + ", ".join(field.name for field in dataclasses.fields(wanted))
    return NAMES[wanted]


def _show(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def _section_lines(config: object, key: str) -> list[str]:
    """The scalars of a section, then its sections, as TOML wants them."""
    assert dataclasses.is_dataclass(config), f"{config!r} is no config"
    values = {field.name: getattr(config, field.name) for field in _init_fields(type(config))}
    lines = [
        f"{name} = {_toml_value(value)}" for name, value in values.items() if not _is_section(value)
    ]
    for name, value in values.items():
        path = f"{key}.{name}" if key else name
        if dataclasses.is_dataclass(value):
            lines += ["", f"[{path}]", *_section_lines(value, path)]
        elif _is_section(value):
            for item in value:
                lines += ["", f"[[{path}]]", *_section_lines(item, path)]
    return lines


def _is_section(value: Any) -> bool:
    if isinstance(value, tuple):
        return bool(value) and all(dataclasses.is_dataclass(item) for item in value)
    return dataclasses.is_dataclass(value)


def _toml_value(value: Any) -> str:
    if value is None:
        return f'"{NONE}"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | Path):
        return _toml_text(str(value))
    if isinstance(value, Mapping):
        items = (f"{_toml_text(str(name))} = {_toml_value(item)}" for name, item in value.items())
        return "{ " + ", ".join(items) + " }" if value else "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    raise AssertionError(f"a config holds {value!r}, which TOML cannot say")


def _toml_text(text: str) -> str:
    """A TOML basic string: JSON's, but DEL must be escaped and surrogate pairs must not be."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
