"""What a model folder says about its tokenizer beside the tokenizer: special tokens, a template."""

from pathlib import Path

from dpo_minimal import InputError
from dpo_minimal.extras.reading import read_json, reading

NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def read_settings(folder) -> dict:
    """The folder's tokenizer_config.json; {} if it has none."""
    path = Path(folder) / "tokenizer_config.json"
    return read_json(path) if path.exists() else {}


def spelling(token) -> str | None:
    """The text of a special token, a string or {"content": string}; None for anything else."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def named_tokens(folder) -> dict[str, str]:
    """{"bos_token": "<s>", ...}: the special tokens that templates call by these names."""
    settings = read_settings(folder)
    found = {name: spelling(settings.get(name)) for name in NAMES}
    return {name: text for name, text in found.items() if text is not None}


def added_tokens(folder) -> dict[str, int]:
    """{text: id} of the special tokens that were added to the tokenizer's own vocabulary."""
    added = read_settings(folder).get("added_tokens_decoder")
    tokens = {}
    for number, token in (added if isinstance(added, dict) else {}).items():
        special = isinstance(token, dict) and token.get("special")
        if special and number.isdecimal() and spelling(token):
            tokens[spelling(token)] = int(number)
    return tokens


def template_in(folder) -> str | None:
    """A folder's chat template: chat_template.jinja, else the one in tokenizer_config.json.

    Of several named ones, a list of {name, template}, it is that called "default".
    """
    path = Path(folder) / "chat_template.jinja"
    if path.exists():
        return read_template(path)
    found = read_settings(folder).get("chat_template")
    if isinstance(found, list):
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        if "default" not in named:
            raise InputError(f"{folder}: no chat template is called default: --chat-template FILE")
        found = named["default"]
    if found is not None and not isinstance(found, str):
        raise InputError(f"{folder}: chat_template in tokenizer_config.json is not a text")
    return found


def read_template(path) -> str:
    """The text of a template file."""
    with reading(path, "a text in UTF-8"):
        return Path(path).read_text("utf-8")


def spaces_every_piece(folder) -> bool:
    """Whether SentencePiece's space goes before every piece between special tokens, or the first.

    Meta's code has it at every piece. Folders for transformers say it in their tokenizer.json, or
    by "legacy" in tokenizer_config.json, which is false where it is left out.
    """
    path = Path(folder) / "tokenizer.json"
    if path.exists():
        said = read_json(path)
        normalizer, splitter = str(said.get("normalizer")), said.get("pre_tokenizer") or {}
        return "Prepend" in normalizer or splitter.get("prepend_scheme") == "always"
    settings = read_settings(folder)
    return not settings or bool(settings.get("legacy", False))
