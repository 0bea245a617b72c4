"""Make a command out of a job's Config: one flag for each of its values.

    @verb(EvaluateConfig, positional=("models",), show=show)
    def evaluate(config: EvaluateConfig) -> Summary:
        \"\"\"Measure ...\"\"\"
        return moesaic.evaluate(config)

gives `moesaic evaluate MODELS --data TOKENS --batch-size 8 --json`. The Config is the only place
where a flag's name, type, default and help stand. Sections become dotted flags (`--optimizer.lr`);
each section of a list is one `--sources name=web,path=texts`. A verb with a recipe takes a TOML
file too, which the flags override, and `--dry-run`.

Everything here must answer `--help` at once, so nothing here or in a Config loads torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import json
import math
import sys
import tomllib
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TextIO, TypeVar, get_args, get_origin

from cyclopts import Group, Parameter

from moesaic.cli.show import Show
from moesaic.config import NONE, Leaf, build, describe, leaves, load_toml, merge, to_toml
from moesaic.errors import ConfigError

Config = TypeVar("Config")
Summary = dict[str, Any]
"""What a job says it did: JSON-ready."""

ARGUMENTS = Group("Given by position", sort_key=1)
OPTIONS = Group("Options", sort_key=2)


def verb(
    cls: type[Config],
    *,
    show: Show,
    positional: tuple[str, ...] = (),
    recipe: bool = False,
    streams: bool = False,
    status: Callable[[Summary], int] = lambda _: 0,
    elsewhere: Callable[[Any, bool], int | None] = lambda config, as_json: None,
) -> Callable[[Callable[..., Summary]], Callable[..., int]]:
    """Turn a function of one Config into a command.

    Args:
        cls: The job's Config. Each of its values becomes a flag.
        show: Turns a summary into lines for people.
        positional: Values given by position instead; a tuple among them takes all that is left.
        recipe: Take a TOML file first, and `--dry-run`.
        streams: The function also takes `on_text`, which prints text as it comes; it is None
            where the result is to be JSON.
        status: The exit status that a summary ends with.
        elsewhere: Called with the config, and whether the result is to be JSON, before the job. It
            may have other processes do the job and print its result, and then returns their exit
            status; None if the job is to be done here.
    """

    def decorate(job: Callable[..., Summary]) -> Callable[..., int]:
        flags = {leaf.name.replace(".", "__"): leaf for leaf in leaves(cls)}

        def command(*args: Any, **given: Any) -> int:
            # Only what was typed: cyclopts leaves defaults to the signature.
            typed = command.__signature__.bind(*args, **given).arguments  # type: ignore[attr-defined]
            as_json, dry_run = typed.pop("json", False), typed.pop("dry_run", False)
            path = typed.pop("recipe", None)
            values = nest({flags[name]: value for name, value in typed.items()})
            if path is not None:
                values = merge(load_toml(path), values)
            config = build(cls, values, where=path or "the command line")
            if dry_run:
                print(to_toml(config), end="")
                return 0
            if (done := elsewhere(config, as_json)) is not None:
                return done
            also = {"on_text": None if as_json else _writer(sys.stdout)} if streams else {}
            # Only results may reach stdout, whatever a library prints.
            with contextlib.redirect_stdout(sys.stderr):
                summary = job(config, **also)
            print_summary(summary, as_json=as_json, show=show)
            return status(summary)

        parameters = [_parameter(name, leaf, positional, recipe) for name, leaf in flags.items()]
        parameters.sort(key=lambda parameter: (_order(parameter.name, positional), parameter.kind))
        if recipe:
            parameters = [_RECIPE, *parameters, _DRY_RUN]
        command.__signature__ = inspect.Signature([*parameters, _JSON])  # type: ignore[attr-defined]
        command.__name__ = job.__name__
        command.__doc__ = job.__doc__
        return command

    return decorate


def _writer(stdout: TextIO) -> Callable[[str], None]:
    def write(text: str) -> None:
        stdout.write(text)
        stdout.flush()

    return write


def nest(typed: Mapping[Leaf, Any]) -> dict[str, Any]:
    """Dotted values as nested sections, which is what a recipe is."""
    values: dict[str, Any] = {}
    for leaf, value in typed.items():
        *sections, name = leaf.name.split(".")
        section = values
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = _flag_value(leaf, value)
    return values


def _flag_value(leaf: Leaf, typed: Any) -> Any:
    """What a recipe would hold where a flag has `typed`."""
    section = _listed_section(leaf.type)
    if section is not None:
        return [_section_value(leaf.name, section, text) for text in typed]
    if _flag_type(leaf.type) is str is not leaf.type:
        return _from_toml(typed)
    return typed


def _section_value(flag: str, section: type, text: str) -> dict[str, Any]:
    """`name=web,path=texts` as a section of a recipe."""
    types_of = {leaf.name: leaf.type for leaf in leaves(section)}
    values = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(
                f"--{flag} is {text!r}, but is written {'=...,'.join(list(types_of)[:2])}=... "
                f"with any of {', '.join(types_of)}."
            )
        is_text = types_of.get(name) in (str, Path)
        values[name] = value if is_text else _from_toml(value)
    return values


def print_summary(summary: Summary, *, as_json: bool, show: Show) -> None:
    """Print what a job did on stdout: JSON for programs, lines for people."""
    if as_json:
        print(json.dumps(_json_ready(summary), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        for line in show(summary):
            print(line)


def _json_ready(value: Any) -> Any:
    """JSON has no infinity and no NaN; null stands for a number that is none."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_ready(item) for item in value]
    return str(value) if isinstance(value, Path) else value


_RECIPE = inspect.Parameter(
    "recipe",
    inspect.Parameter.POSITIONAL_ONLY,
    default=None,
    annotation=Annotated[
        Path | None, Parameter(help="TOML file; flags override it.", group=ARGUMENTS)
    ],
)
_DRY_RUN = inspect.Parameter(
    "dry_run",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[
        bool,
        Parameter(
            name="--dry-run",
            negative=(),
            show_default=False,
            help="Print the full config and stop.",
            group=OPTIONS,
        ),
    ],
)
_JSON = inspect.Parameter(
    "json",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[
        bool,
        Parameter(
            name="--json",
            negative=(),
            show_default=False,
            help="Print the result as JSON.",
            group=OPTIONS,
        ),
    ],
)


def _order(name: str, positional: tuple[str, ...]) -> int:
    return positional.index(name) if name in positional else len(positional)


def _parameter(
    name: str, leaf: Leaf, positional: tuple[str, ...], recipe: bool
) -> inspect.Parameter:
    by_position = name in positional
    is_required = leaf.default is dataclasses.MISSING
    must_be_typed = is_required and not recipe
    section = leaf.name.rpartition(".")[0]
    wanted = _flag_type(leaf.type)
    flag = "--" + leaf.name.replace("_", "-")
    options = Parameter(
        name=None if by_position else flag,
        help=_help(leaf),
        # A switch that is on by default is turned off by --no-switch; nothing else has two forms.
        negative="--no-" + leaf.name.replace("_", "-") if leaf.default is True else (),
        show_default=False if is_required else lambda _: _default_text(leaf.default),
        group=_group(section) if section else ARGUMENTS if by_position else OPTIONS,
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.POSITIONAL_ONLY if by_position else inspect.Parameter.KEYWORD_ONLY,
        # Never the Config's own default, or a recipe's value would seem overridden; and one that
        # fits the type, since cyclopts checks it wherever some library has imported pydantic.
        default=inspect.Parameter.empty if must_be_typed else None,
        annotation=Annotated[wanted if must_be_typed else wanted | None, options],
    )


def _help(leaf: Leaf) -> str:
    section = _listed_section(leaf.type)
    if section is not None:
        known = ", ".join(inner.name for inner in leaves(section))
        return f"{leaf.doc} Written name=value,name=value with {known}; may be given several times."
    if _flag_type(leaf.type) is str is not leaf.type:
        return f"{leaf.doc} ({describe(leaf.type)})"
    return leaf.doc


@functools.cache
def _group(section: str) -> Group:
    """The box of a section in `--help`; cyclopts wants one object for one name."""
    return Group(section, sort_key=3)


def _flag_type(wanted: Any) -> Any:
    """What cyclopts shall convert a flag to; str where only TOML can tell what was meant."""
    if _listed_section(wanted) is not None:
        return tuple[str, ...]
    members = [arg for arg in get_args(wanted) if arg is not types.NoneType]
    if get_origin(wanted) is types.UnionType and len(members) > 1:
        return str
    inner = members[0] if get_origin(wanted) is types.UnionType else wanted
    if inner in (str, int, float, bool, Path) or get_origin(inner) in (Literal, tuple):
        return wanted
    return str


def _listed_section(wanted: Any) -> type | None:
    """The section that a list holds, if it is a list of sections."""
    inner = get_args(wanted)
    if get_origin(wanted) is tuple and dataclasses.is_dataclass(inner[0]):
        assert isinstance(inner[0], type)
        return inner[0]
    return None


def _from_toml(text: Any) -> Any:
    """`3`, `[1, 2]` or `{ code = 7.0 }` as TOML reads it; anything else is text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _default_text(default: Any) -> str:
    if default is None:
        return NONE
    if isinstance(default, tuple | list):
        return " ".join(_default_text(item) for item in default) or NONE
    if isinstance(default, float):
        return f"{default:g}"
    return str(default).lower() if isinstance(default, bool) else str(default)
