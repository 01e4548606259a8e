"""Chat templates: which one a model speaks, and conversations in token ids.

A template is Jinja source, as in the folders of instruct models. None stands for the blog's text,
`Question: ... Answer:`, which needs no Jinja here; for other tools QA_JINJA says the same.

Only the template places special tokens. Where a message spells one, such as <|im_end|>, that stays
content: it is encoded as ordinary text. So nobody can end a turn, or speak for somebody else, from
within a message, and data that speak of special tokens can be learned. (transformers' own
`apply_chat_template` makes special tokens of them.)
"""

import hashlib
import re
from itertools import islice
from pathlib import Path

from dpo_minimal import InputError
from dpo_minimal.extras.reading import read_json
from dpo_minimal.files import whole_file, write_json
from dpo_minimal.formats.conversations import Message, as_messages
from dpo_minimal.formats.jinja import compile_template
from dpo_minimal.formats.layout import data_parts
from dpo_minimal.formats.rendered import rendered_encoder, special_tokens
from dpo_minimal.formats.rows import data_files, pair_of, read_rows
from dpo_minimal.formats.tokenizer_config import named_tokens, read_template, template_in
from dpo_minimal.tokenizer import load_tokenizer

# The blog's text for tools that speak templates; its BOS is ours, its EOS ends the answer.
QA_JINJA = """\
{%- if messages[0]['role'] != 'user' or messages|length > 2 %}
{{- raise_exception('this model was tuned on one question and its answer: no system, no turns') }}
{%- endif %}
{{- bos_token + 'Question: ' + messages[0]['content'] + '\\n\\nAnswer:' }}
{%- if messages|length == 2 %}
{{- ' ' + messages[1]['content'] + eos_token }}
{%- endif %}
"""
OPEN, CLOSE = "\ue000", "\ue001"  # private characters: around the number of a spelled token


class ChatTemplate:
    """A template on a tokenizer. `end_id` is the token that ends an assistant's turn."""

    def __init__(self, source: str, tokenizer, folder):
        self.source, special = source, special_tokens(tokenizer, folder)
        self.render_messages = compile_template(source)
        self.encode_rendered = rendered_encoder(tokenizer, special, folder)
        self.special_ids = set(special.values())
        texts = {number: text for text, number in special.items()}
        ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
        self.names = {name: texts[i] for name, i in ids.items() if i in texts}
        self.names |= named_tokens(folder)
        # What must not come out of a message as what it looks like; the longest first.
        self.protected = sorted([*special, OPEN], key=len, reverse=True)
        self.spelled = re.compile("|".join(map(re.escape, self.protected)))
        _, answer = self.encode_example("Is it?", "Yes.")
        self.end_id = answer[-1]

    def render(self, messages, add_generation_prompt: bool) -> str:
        """The text of messages. Special tokens that they spell are hidden: see `show`."""
        turns = [{"role": role, "content": self.hide(content)} for role, content in messages]
        return self.render_messages(turns, add_generation_prompt, **self.names)

    def hide(self, content: str) -> str:
        """The content with private marks in place of each special token that it spells."""
        return self.spelled.sub(
            lambda found: f"{OPEN}{self.protected.index(found[0])}{CLOSE}", content
        )

    def show(self, text: str) -> str:
        """The text with what `hide` hid."""
        return re.sub(f"{OPEN}(\\d+){CLOSE}", lambda found: self.protected[int(found[1])], text)

    def encode(self, messages, add_generation_prompt: bool) -> list[int]:
        """Messages in tokens. add_generation_prompt: up to where the assistant's answer begins."""
        return self.encode_rendered(self.render(messages, add_generation_prompt), self.show)

    def encode_example(self, prompt, *answers: str) -> tuple[list[int], ...]:
        """As `data.encode_example`: (prompt ids, ids of each answer up to its end-of-turn token).

        What a template has behind that token, such as ChatML's line break, is neither scored nor
        sampled. If the tokenizer would merge the white space in front of an answer with the end of
        the prompt, the answer goes without it. InputError if it merges anything else, or if there
        is no end-of-turn token.
        """
        messages = as_messages(prompt)
        begin = self.encode(messages, True)
        return begin, *(self.encode_answer(begin, messages, text) for text in answers)

    def encode_answer(self, begin: list[int], messages, text: str) -> list[int]:
        """The ids of an answer behind `begin`, those of the prompt; see encode_example."""
        for said in (text, text.lstrip()):
            scored = self.behind(begin, messages, said)
            if scored is not None:
                return scored
        raise InputError(
            "the chat template's prompt is not how its conversations begin, or the tokenizer "
            f"merges it with what follows, as in {text[:40]!r}"
        )

    def behind(self, begin: list[int], messages, text: str) -> list[int] | None:
        """The ids of an answer behind the prompt's, or None if the joint ids begin otherwise."""
        joint = self.encode((*messages, Message("assistant", text)), False)
        if joint[: len(begin)] != begin:
            return None
        scored = joint[len(begin) :]
        end = next((i for i, token in enumerate(scored) if token in self.special_ids), 0)
        if end == 0:
            raise InputError(
                "the chat template has no special token behind an answer, or has one in front of "
                "it: with --chat-template FILE give one that ends each assistant's turn"
            )
        return scored[: end + 1]


# --- which template ---------------------------------------------------------------------------


def find_template(*folders) -> str | None:
    """The template of the first folder that has one; None for the blog's text, or if none has one.

    folders: paths of adapters and models; a None among them is passed over.
    """
    for folder in folders:
        found = template_in(folder) if folder else None
        if found is not None:
            return None if found == QA_JINJA else found
    return None


def chosen_template(args, *folders) -> str | None:
    """The template that --template and --chat-template ask for, else that of the folders."""
    if args.template == "qa":
        return None
    if args.chat_template:
        return read_template(args.chat_template)
    if args.template is None:
        return find_template(*folders)
    found = map(find_template, folders)
    known = next((template for template in found if template is not None), None)
    if known is None:
        tried = " and ".join(str(folder) for folder in folders if folder)
        raise InputError(
            f"no chat template in {tried}: give --chat-template FILE, or --template qa"
        )
    return known


def settle_template(args):
    """Decide on args.template, "qa" or "chat", for good, and check that it can be used.

    Without a word from the user, an adapter to go on from decides, then the first row of the data:
    messages ask for a chat template. args.template_digest tells one template from another.
    """
    if args.template is None:
        tuned = template_in(args.sft_adapter) if args.sft_adapter else None
        if tuned is None:
            chat = bool(args.chat_template) or first_is_conversation(args.data)
        else:
            chat = tuned != QA_JINJA
        args.template = "chat" if chat else "qa"
    if args.template == "chat" and args.model and not Path(args.model).is_dir():
        raise InputError(f"{args.model}: no such model folder")
    template = chosen_template(args, args.sft_adapter, args.model)
    if template is not None:
        compile_template(template)
    digest = hashlib.sha256((template or QA_JINJA).encode()).hexdigest()[:12]
    if getattr(args, "template_digest", None) not in (None, digest):
        raise InputError("the chat template is not the one that the earlier run was tuned in")
    args.template_digest = digest


def first_is_conversation(data) -> bool:
    """Whether the first row of the training data is one of messages."""
    if data is None:
        return False
    for file in data_files(data_parts(Path(data))["train"]):
        for place, row in islice(read_rows(file), 1):
            return not isinstance(pair_of(place, row)[0], str)
    return False


def write_template(folder, template: str | None):
    """Make a folder say in which template its model was tuned, and in no other."""
    folder = Path(folder)
    with whole_file(folder / "chat_template.jinja") as file:
        file.write((template or QA_JINJA).encode())
    settings = folder / "tokenizer_config.json"
    if settings.exists() and "chat_template" in (said := read_json(settings)):
        del said["chat_template"]
        write_json(settings, said)
    for other in folder.glob("*.jinja"):
        if other.name != "chat_template.jinja":
            other.unlink()
    if template is not None and (folder / "config.json").exists():
        write_end(folder, load_tokenizer(folder, template).eos_id)


def write_end(folder: Path, end_id: int):
    """Let generation_config.json say that the template's end of turn ends an answer."""
    path = folder / "generation_config.json"
    settings = read_json(path) if path.exists() else {}
    known = settings.get("eos_token_id", read_json(folder / "config.json").get("eos_token_id"))
    if isinstance(known, int):
        known = [known]
    if end_id not in (known or []):
        write_json(path, settings | {"eos_token_id": [*(known or []), end_id]})
