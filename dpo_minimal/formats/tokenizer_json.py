"""A Hugging Face `tokenizer.json`, behind the interface of `tokenizer.Tokenizer`."""

from pathlib import Path

from dpo_minimal import InputError
from dpo_minimal.extras.reading import reading
from dpo_minimal.formats.tokenizer_config import named_tokens


class JsonTokenizer:
    """A folder's `tokenizer.json`, with the BOS and EOS that its `tokenizer_config.json` names."""

    template = None  # the blog's text; see load_tokenizer

    def __init__(self, folder):
        try:
            from tokenizers import Tokenizer
        except ImportError:
            reason = "has only a tokenizer.json: pip install tokenizers to read it"
            raise InputError(f"{folder} {reason}") from None
        folder = Path(folder)
        path = folder / "tokenizer.json"
        with reading(path, "a tokenizer"):
            self.model = Tokenizer.from_file(str(path))
        # If a text spells <|im_end|>, that is text; special tokens are placed by us only.
        self.model.encode_special_tokens = True
        self.bos_id = self.special_id(folder, "bos_token")
        self.eos_id = self.special_id(folder, "eos_token")
        self.vocab_size = self.model.get_vocab_size()

    def special_id(self, folder: Path, name: str) -> int:
        """The id of `bos_token` or `eos_token`, a string or {"content": string} in the settings."""
        path = folder / "tokenizer_config.json"
        text = named_tokens(folder).get(name)
        with reading(path, "settings"):  # half a surrogate pair is no text to look up
            number = None if text is None else self.model.token_to_id(text)
        if number is None:
            raise InputError(f"{path}: no {name} that the tokenizer.json knows")
        return number

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids of a text, with one BOS in front and one EOS behind if asked for."""
        ids = self.model.encode(text, add_special_tokens=False).ids
        return [self.bos_id] * bos + ids + [self.eos_id] * eos

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens left out."""
        return self.model.decode(ids, skip_special_tokens=True)
