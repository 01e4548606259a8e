"""Conversations in data files, whichever way a data set writes them, in one form.

A prompt is a text (`str`), or a conversation: a tuple of `Message`s whose last one is the user's.
Both can be compared and hashed, so that equal prompts are held out together. What a row has beside
its prompt (`system`, `history`) becomes a part of the conversation; nothing is left out silently.
"""

import json
from typing import NamedTuple

from dpo_minimal import InputError

ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names
ROLES |= {role: role for role in ("system", "user", "assistant")}
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # how HH-RLHF writes a dialogue as one text


class Message(NamedTuple):
    """What one side says. role: system, user or assistant."""

    role: str
    content: str


def is_conversation(row: dict) -> bool:
    """Whether a row holds messages instead of texts."""
    fields = [row.get(name) for name in ("prompt", "chosen", "rejected")]
    return "conversations" in row or any(isinstance(field, (list, dict)) for field in fields)


def conversation_of(place: str, row: dict) -> tuple[tuple[Message, ...], str, str]:
    """(prompt, chosen answer, rejected answer) of a row of messages; InputError with the place.

    The prompt stands in front of both answers (UltraFeedback), or apart as `prompt` (TRL) or as
    `conversations` (ShareGPT).
    """
    name = "conversations" if "conversations" in row else "prompt"
    before = read_turns(place, row, name, "user") if row.get(name) is not None else ()
    prompts, answers = [], []
    for name in ("chosen", "rejected"):
        *turns, answer = read_turns(place, row, name, "assistant")
        inside = tuple(turns)
        if inside and not set(before) <= set(inside):
            raise InputError(f"{place}: the prompt is not among the messages of {name!r}")
        if answer.role != "assistant":
            raise InputError(f"{place}: the last message of {name!r} is not the assistant's")
        prompts.append(inside or before)
        answers.append(answer.content)
    if prompts[0] != prompts[1]:
        raise InputError(f"{place}: chosen and rejected differ before their last messages")
    return check_prompt(place, in_context(place, row, prompts[0])), *answers


def read_turns(place: str, row: dict, name: str, role: str) -> tuple[Message, ...]:
    """A field as messages: a list of them, one of them, or a text, which is said by `role`."""
    value = row.get(name)
    if isinstance(value, str):
        return (Message(role, value),)
    turns = value if isinstance(value, list) else [value]
    if not turns or not all(isinstance(turn, dict) for turn in turns):
        found = f"is {type(value).__name__}, not text" if name in row else "is missing: not text"
        raise InputError(f"{place}: the field {name!r} {found} or messages of role and content")
    return tuple(read_message(f"{place}: a message of {name!r}", turn) for turn in turns)


def read_message(place: str, turn: dict) -> Message:
    """A message as {role, content}, or as ShareGPT's {from, value}."""
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if role not in ROLES:
        raise InputError(f"{place} has the role {role!r}: known are {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise InputError(f"{place} has content that is {type(content).__name__}, not text")
    if turn.get("tool_calls"):
        raise InputError(f"{place} calls tools, which are not supported here")
    return Message(ROLES[role], content)


def in_context(place: str, row: dict, prompt):
    """The prompt with what the row has beside it: `system`, `history`. A text stays one if it can.

    history: [[question, answer], ...], the turns before.
    """
    if row.get("tools"):
        raise InputError(f"{place}: the row has tools, which are not supported here")
    system, history = row.get("system") or row.get("system_prompt"), row.get("history") or []
    if not system and not history:
        return prompt
    turns = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    pairs = isinstance(history, list) and all(is_pair_of_texts(pair) for pair in history)
    if not pairs or not isinstance(system or "", str):
        raise InputError(f"{place}: system should be a text, history a list of [question, answer]")
    earlier = [Message(role, text) for pair in history for role, text in zip(SIDES, pair)]  # noqa: B905
    if earlier and len(turns) > 1:
        raise InputError(f"{place}: the row has earlier turns in its prompt and in its history")
    if system and turns[0].role != "system":
        earlier.insert(0, Message("system", system))
    elif system and turns[0].content != system:
        raise InputError(f"{place}: the row has two system messages")
    return (*earlier, *turns)


SIDES = ("user", "assistant")


def is_pair_of_texts(value) -> bool:
    """Whether a value is [question, answer]."""
    right = isinstance(value, (list, tuple)) and len(value) == 2
    return right and all(isinstance(text, str) for text in value)


def check_prompt(place: str, prompt: tuple[Message, ...]) -> tuple[Message, ...]:
    """InputError unless the user speaks last, so that an answer can follow."""
    if not prompt:
        raise InputError(f"{place}: no prompt, and no message before the last one in 'chosen'")
    if prompt[-1].role != "user":
        raise InputError(f"{place}: the message before the answer is the {prompt[-1].role}'s")
    return prompt


# --- a prompt in other forms ------------------------------------------------------------------


def as_messages(prompt) -> tuple[Message, ...]:
    """A prompt as messages. A text is the user's, or, in HH-RLHF's form, a dialogue."""
    if not isinstance(prompt, str):
        return tuple(prompt)
    if ASSISTANT not in prompt or HUMAN not in prompt:
        return (Message("user", prompt),)
    turns, role, rest = [], "user", prompt
    while rest is not None:
        mark = ASSISTANT if role == "user" else HUMAN
        said, found, rest = rest.partition(mark)
        turns.append(Message(role, said.strip()))
        role = "assistant" if role == "user" else "user"
        rest = rest if found else None
    return tuple(turns)


def only_question(prompt) -> str:
    """The text of a prompt that the blog's `Question: ... Answer:` can hold: one turn, no system.

    InputError for other conversations, because their further messages would be lost.
    """
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1 and prompt[0].role == "user":
        return prompt[0].content
    roles = ", ".join(message.role for message in prompt)
    raise InputError(
        f"a conversation of {roles} (it begins {prompt[0].content[:40]!r}) needs a chat template: "
        "--template chat, with --chat-template FILE if the model has none"
    )


def spoken(prompt) -> str:
    """A prompt for people to read."""
    if isinstance(prompt, str) or len(prompt) == 1:
        return only_question(prompt)
    return "\n\n".join(f"{role}: {content}" for role, content in prompt)


def pack_prompt(prompt) -> str:
    """A prompt as one text: a text as it is, a conversation as JSON behind a zero byte."""
    if isinstance(prompt, str) and not prompt.startswith("\0"):
        return prompt
    return "\0" + json.dumps(prompt, ensure_ascii=False)


def unpack_prompt(text: str):
    """The prompt that `pack_prompt` packed."""
    if not text.startswith("\0"):
        return text
    value = json.loads(text[1:])
    return value if isinstance(value, str) else tuple(Message(*message) for message in value)
