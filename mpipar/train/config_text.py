"""Settings as text: the command line, TOML files, and back.

They come from a TOML file (`--config`), from the command line (`--section.key value`, which wins), and from the
defaults in `config`. Those of a run are kept, resolved, as `config.toml` in its folder and in its checkpoints.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import tyro

from mpipar import command_line
from mpipar.errors import ConfigError
from mpipar.train.config import Config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def parse(arguments: Sequence[str]) -> Config:
    """The settings that a command line asks for.

    Raises:
        ConfigError: The TOML file is missing or does not parse, a key or a flag does not exist, a value cannot be.
        SystemExit: --help was asked for, and printed.
    """
    arguments = [{"true": "True", "false": "False"}.get(argument, argument) for argument in arguments]
    default = Config()
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument.startswith("--config=") or (argument == "--config" and following):
            default = read_toml(Path(argument.partition("=")[2] or following))
    boolean_values = (tyro.conf.FlagConversionOff,)
    return command_line.parse(Config, "python -m mpipar.train", arguments, default=default, markers=boolean_values)


def read_toml(path: Path) -> Config:
    """The settings of a TOML file over the defaults."""
    try:
        text = path.read_text("utf-8")
        table = tomllib.loads(text)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"--config {path} cannot be read: {error}") from error
    config: Config = from_table(Config(), table, str(path))
    return config


def from_table(default: Any, table: Mapping[str, Any], source: str, section: str = "") -> Any:
    """`default`, a dataclass, with the values of a nested table; unknown keys and wrong types are errors."""
    known = {f.name: getattr(default, f.name) for f in fields(default) if f.name != "config"}
    hints = get_type_hints(type(default))
    values = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        where = f"{section}.{key}" if section else key
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise ConfigError(f"{source}: the key {where!r} does not exist: {hint}")
        current = known[name]
        if is_dataclass(current):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{source}: {where!r} is a section: write [{where}] and its keys below")
            values[name] = from_table(current, value, source, where)
        else:
            values[name] = _typed(hints[name], value, where, source)
    return replace(default, **values)


def to_table(config: Any) -> dict[str, Any]:
    """A dataclass as nested tables of plain values; what is None is left out."""
    table: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        if is_dataclass(value):
            table[f.name] = to_table(value)
        elif value is not None:
            table[f.name] = _plain(value)
    return table


def to_toml(config: Config) -> str:
    """The settings as a TOML file that `--config` reads. `config` itself, the name of another file, is not in it."""
    table = to_table(replace(config, config=None))
    # Strings, numbers and booleans of JSON are those of TOML.
    lines = [
        f"{key} = {json.dumps(value, ensure_ascii=False)}"
        for key, value in table.items()
        if not isinstance(value, dict)
    ]
    for section, values in table.items():
        if isinstance(values, dict):
            lines += ["", f"[{section}]"] + [
                f"{key} = {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()
            ]
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> Any:
    """A setting as TOML and JSON know it."""
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _typed(hint: Any, value: Any, where: str, source: str) -> Any:
    """A TOML value as the type of its setting: a plain one, one of several words, one that may be left out, several."""
    if get_origin(hint) is tuple:
        items = value if isinstance(value, list) else [value]
        return tuple(_typed(get_args(hint)[0], item, where, source) for item in items)
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    if value in kinds:
        return value
    kind = kinds[0]
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is kind:
        return value
    expected = kind.__name__ if isinstance(kind, type) else f"one of {', '.join(map(repr, kinds))}"
    raise ConfigError(f"{source}: {where!r} is {value!r}: expected {expected}")
