"""SentencePiece, Llama's tokenizer: load, train, encode, decode.

For a folder that has only a `tokenizer.json` (SmolLM2, Llama 3), `formats/tokenizer_json.py` makes
an object with the same five names.
"""

import io
from pathlib import Path

import sentencepiece

from dpo_minimal import InputError
from dpo_minimal.extras.reading import reading
from dpo_minimal.files import write_json

# Beside a tokenizer.model, so that transformers reads it as it reads Llama 2's.
TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
}


class Tokenizer:
    """A SentencePiece model file. Ids are ints; `bos_id` and `eos_id` frame a text."""

    template = None  # the blog's text; see load_tokenizer

    def __init__(self, path):
        with reading(path, "a SentencePiece model"):
            self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self.bos_id, self.eos_id = self.model.bos_id(), self.model.eos_id()
        self.vocab_size = self.model.vocab_size()

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids of a text, with one BOS in front and one EOS behind if asked for."""
        return [self.bos_id] * bos + self.model.encode(text) + [self.eos_id] * eos

    def decode(self, ids: list[int]) -> str:
        """The text of token ids; BOS and EOS have none, nor have those that a chat added."""
        return self.model.decode([i for i in ids if i < self.vocab_size])


def train_tokenizer(texts, vocab_size: int, path) -> Tokenizer:
    """Learn a tokenizer from an iterable of texts, with Llama's settings, into the file `path`.

    BPE, unknown characters as bytes, digits one by one, no normalization. It learns from one line
    at a time, so that a line break is a byte of its own, as in Llama 2. A tokenizer_config.json for
    transformers goes beside the file.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for text in texts for line in text.splitlines() if line),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=0.99995,
        minloglevel=2,
    )
    Path(path).write_bytes(model.getvalue())
    write_json(Path(path).with_name("tokenizer_config.json"), TOKENIZER_CONFIG)
    return Tokenizer(path)


def load_tokenizer(folder, template: str | None = None):
    """The tokenizer of a model folder: its `tokenizer.model`, else its `tokenizer.json`.

    template: the Jinja source of a chat template; None for the blog's text. With one, `eos_id` is
    the token that ends an assistant's turn.
    """
    folder = Path(folder)
    if (folder / "tokenizer.model").exists():
        tokenizer = Tokenizer(folder / "tokenizer.model")
    elif (folder / "tokenizer.json").exists():
        from dpo_minimal.formats.tokenizer_json import JsonTokenizer

        tokenizer = JsonTokenizer(folder)
    else:
        raise InputError(f"{folder}: no tokenizer.model and no tokenizer.json in this model folder")
    if template is not None:
        from dpo_minimal.formats.chat import ChatTemplate

        tokenizer.template = ChatTemplate(template, tokenizer, folder)
        tokenizer.eos_id = tokenizer.template.end_id
    return tokenizer
