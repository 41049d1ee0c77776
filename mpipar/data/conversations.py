"""Conversations: from a JSON record to its messages, and from messages to tokens of which the answers count.

    {"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}
    {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}]}

Either becomes [["user", "2 + 2?"], ["assistant", "4"]] as JSON: the document that is hashed, compared and chosen for
validation, whatever the record held beside it.

The pieces of a conversation (what the template says, each content) are encoded one by one, so that no token is part of
an answer and part of something else, and a prompt has the same tokens as when the model is asked. In what the template
says names of special tokens are those tokens; in a content they are letters.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpipar.data.skipped import RecordError
from mpipar.data.templates import ANSWERS, Template
from mpipar.data.tokenizer import Tokenizer
from mpipar.errors import DataError

Ids = NDArray[np.uint32]
Counted = NDArray[np.bool_]

# Where a record has its messages, and what these call the role and the content.
FORMS = {"messages": ("role", "content"), "conversations": ("from", "value")}
_OTHER_NAMES = {"human": "user", "gpt": ANSWERS}


def conversation(record: object, template: Template) -> bytes:
    """The messages of a record, as a document.

    Raises:
        RecordError: It has none, or one of a role that the template does not know, or nothing to learn.
        UnicodeEncodeError: A text in it is none.
    """
    if not isinstance(record, dict):
        raise RecordError("no messages", "expected an object with a list in its field 'messages', got no object")
    field = next((field for field in FORMS if field in record), None)
    if field is None:
        raise RecordError("no messages", f"expected the field 'messages', got {_listed(record)}")
    messages = record[field]
    if not isinstance(messages, list) or not messages:
        raise RecordError("no messages", f"expected a list of messages in the field {field!r}")
    turns = [_turn(message, FORMS[field], number) for number, message in enumerate(messages, start=1)]
    for number, (role, content) in enumerate(turns, start=1):
        if role not in template.roles:
            known = ", ".join(template.roles)
            raise RecordError("unknown role", f"message {number} is of {role[:40]!r}, the template has {known}")
        if role == ANSWERS and not content.strip():
            raise RecordError("no answer", f"message {number} is an empty one")
    if not any(role == ANSWERS for role, _ in turns):
        raise RecordError("no answer", f"no message is of {ANSWERS!r}")
    return json.dumps(turns, ensure_ascii=False).encode("utf-8")


def compared(document: bytes) -> bytes:
    """What of a conversation is compared with others: not what the system says, which many begin with."""
    turns = [turn for turn in json.loads(document) if turn[0] != "system"]
    return json.dumps(turns, ensure_ascii=False).encode("utf-8")


def _turn(message: object, names: tuple[str, str], number: int) -> tuple[str, str]:
    """(role, content)"""
    role, content = (message.get(name) if isinstance(message, dict) else None for name in names)
    if not isinstance(role, str) or not isinstance(content, str):
        wanted = " and ".join(map(repr, names))
        raise RecordError("no messages", f"message {number}: expected an object with texts in its fields {wanted}")
    return _OTHER_NAMES.get(role, role), content


def _listed(record: Mapping[str, Any]) -> str:
    return (", ".join(map(repr, record)) or "none")[:200]


class ChatEncoder:
    """Encodes conversations.

    Args:
        template: What stands around the messages.
        made_by: Encodes the pieces.

    Raises:
        DataError: The template has the token that ends documents within a conversation.
    """

    def __init__(self, template: Template, made_by: Tokenizer):
        self._made_by = made_by
        self._begin, self._between = (made_by.encode_marked(text) for text in (template.begin, template.between))
        self._turns = {
            role: (made_by.encode_marked(turn.before), made_by.encode_marked(turn.after))
            for role, turn in template.roles.items()
        }
        said = np.concatenate([self._begin, self._between, *(ids for turn in self._turns.values() for ids in turn)])
        if made_by.end_of_text in said:
            raise DataError(
                f"--chat: the template has {made_by.decode([made_by.end_of_text])!r} in it, which with this tokenizer "
                "ends documents, and would cut a conversation in pieces: take a template that ends messages by "
                "something else. An end of text behind the last one follows by itself"
            )
        # A content could still have those that a tokenizer declares as ordinary tokens, or has among its words.
        # White space is no mark, even where a tokenizer has added it.
        marks = [token for token in made_by.added_tokens.intersection(said.tolist()) if made_by.decode([token]).strip()]
        self._never_said = np.array([*marks, made_by.end_of_text])

    def encode(self, conversations: Sequence[bytes]) -> tuple[list[Ids], list[Counted]]:
        """Of each conversation: its ids, with an end of text after them, and which of them count.

        Those of an answer do, and of the mark that ends it.
        """
        parsed: list[list[tuple[str, str]]] = [json.loads(messages) for messages in conversations]
        contents = iter(self._made_by.encode([text.encode("utf-8") for turns in parsed for _, text in turns]))
        ids, counted = [], []
        for turns in parsed:
            parts = [(self._begin, False)]
            for number, (role, _) in enumerate(turns):
                before, after = self._turns[role]
                content = next(contents)[:-1]  # without an end of text
                answers = role == ANSWERS
                parts += [(self._between, False)] * (number > 0)
                parts += [(before, False), (content[~np.isin(content, self._never_said)], answers), (after, answers)]
            parts.append((np.array([self._made_by.end_of_text], np.uint32), False))
            ids.append(np.concatenate([part for part, _ in parts]))
            counted.append(np.repeat([counts for _, counts in parts], [part.size for part, _ in parts]))
        return ids, counted
