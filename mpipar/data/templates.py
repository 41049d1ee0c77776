"""Chat templates: how a conversation becomes one text, as data.

    begin   before after   between   before after   between   ...   before after
            \\ message /               \\ message /                     \\ message /

Some are here by name; others are TOML files of the same words:

    begin = ""
    between = "\\n"
    [user]
    before = "<|im_start|>user\\n"
    after = "<|im_end|>"
    [assistant]
    ...

What stands behind an answer is the mark that ends it, and the model learns to write it: it belongs in `after`. What
only leads over to the next message belongs in `between`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpipar.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ANSWERS = "assistant"
"""The role whose messages are answers."""


@dataclass(frozen=True)
class Turn:
    """What stands around a message."""

    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class Template:
    """What stands around and between the messages of a conversation.

    Args:
        roles: Who may speak.
        begin: Before the first message.
        between: Between two messages.
    """

    roles: Mapping[str, Turn]
    begin: str = ""
    between: str = ""


_LLAMA3_HEAD = "<|start_header_id|>{}<|end_header_id|>\n\n"

TEMPLATES = {
    "chatml": Template(
        {role: Turn(f"<|im_start|>{role}\n", "<|im_end|>") for role in ("system", "user", ANSWERS)},
        between="\n",
    ),
    "llama3": Template(
        {role: Turn(_LLAMA3_HEAD.format(role), "<|eot_id|>") for role in ("system", "user", ANSWERS)},
        begin="<|begin_of_text|>",
    ),
    "plain": Template(
        {
            "system": Turn("", "\n\n"),
            "user": Turn("User:\n", "\n\n"),
            ANSWERS: Turn("Assistant:\n", "\n\n"),
        }
    ),
}


def find_template(name: str) -> Template:
    """The template of this name, or of this TOML file.

    Raises:
        ConfigError: There is none, or the file says something else.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    try:
        return _of_table(tomllib.loads(Path(name).read_text("utf-8")), name)
    except FileNotFoundError as error:
        raise ConfigError(
            f"--chat {name}: there is no such template. Give {', '.join(TEMPLATES)}, or a TOML file (docs/pack.md)"
        ) from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"--chat {name} cannot be read: {error}") from error


def _of_table(table: Mapping[str, Any], name: str) -> Template:
    around, roles = {}, {}
    for key, value in table.items():
        if isinstance(value, Mapping):
            roles[key] = Turn(**_texts(value, ("before", "after"), f"--chat {name}: [{key}]"))
        else:
            around[key] = value
    if ANSWERS not in roles:
        raise ConfigError(f"--chat {name}: has no section [{ANSWERS}], whose messages are the answers to be learnt")
    return Template(roles, **_texts(around, ("begin", "between"), f"--chat {name}"))


def _texts(table: Mapping[str, Any], known: tuple[str, ...], where: str) -> dict[str, str]:
    for key, value in table.items():
        if key not in known or not isinstance(value, str):
            raise ConfigError(f"{where}: {key} = {value!r}: expected texts for {' and '.join(known)}")
    return dict(table)
