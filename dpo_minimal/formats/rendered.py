"""Rendered conversations to token ids: special tokens are ids, all else is ordinary text.

`special_tokens` and `rendered_encoder` know both kinds of tokenizers, SentencePiece's and the
package tokenizers'. The encoder is a function of a text and of `show`, which gives back what
`ChatTemplate.hide` hid: special tokens that a message spells.
"""

import json
import re

from dpo_minimal import InputError
from dpo_minimal.formats.tokenizer_config import added_tokens, spaces_every_piece
from dpo_minimal.tokenizer import Tokenizer


def special_tokens(tokenizer, folder) -> dict[str, int]:
    """{text: id} of a tokenizer's special tokens."""
    if not isinstance(tokenizer, Tokenizer):
        added = tokenizer.model.get_added_tokens_decoder()
        return {token.content: number for number, token in added.items() if token.special}
    model = tokenizer.model
    control = [i for i in range(model.vocab_size()) if model.is_control(i)]
    return {model.id_to_piece(i): i for i in control} | added_tokens(folder)


def rendered_encoder(tokenizer, special: dict[str, int], folder):
    """encode(text, show) -> ids, as transformers encodes the text of a conversation."""
    texts = sorted(special, key=len, reverse=True)
    pattern = re.compile(f"({'|'.join(map(re.escape, texts))})")
    if isinstance(tokenizer, Tokenizer):
        every = spaces_every_piece(folder)
        return lambda text, show: encode_pieces(
            tokenizer, pattern.split(text), special, show, every
        )
    renamed = []  # made when it is needed

    def encode(text, show):
        if show(text) == text:  # no message spells a special token
            tokenizer.model.encode_special_tokens = False
            ids = tokenizer.model.encode(text, add_special_tokens=False).ids
            tokenizer.model.encode_special_tokens = True
            return ids
        renamed[:] = renamed or [with_private_names(tokenizer.model, special)]
        text = show(pattern.sub(lambda found: private_name(special[found[0]]), text))
        return renamed[0].encode(text, add_special_tokens=False).ids

    return encode


def encode_pieces(tokenizer: Tokenizer, pieces, special, show, every: bool) -> list[int]:
    """The ids of texts and special tokens in turn, by SentencePiece.

    It puts a space in front of each text, which belongs in front of `every` one, or the first.
    """
    ids, line_break = [], tokenizer.encode("\n")
    for number, piece in enumerate(pieces):
        if number % 2:
            ids.append(special[piece])
        elif piece and (every or number == 0):
            ids += tokenizer.encode(show(piece))
        elif piece:  # the space goes in front of a line break, and both are left out
            ids += tokenizer.encode("\n" + show(piece))[len(line_break) :]
    return ids


def private_name(number: int) -> str:
    """A special token's name that no text has: private characters around its id."""
    return f"\ue002{number}\ue003"


def with_private_names(model, special: dict[str, int]):
    """A copy of a tokenizer whose special tokens have private names, so that their own are text."""
    said = json.loads(model.to_str())
    for token in said["added_tokens"]:
        if token["content"] in special:
            token["content"] = private_name(special[token["content"]])
    vocabulary = said["model"].get("vocab")
    if isinstance(vocabulary, dict):
        names = {
            text: private_name(i) if special.get(text) == i else text
            for text, i in vocabulary.items()
        }
        said["model"]["vocab"] = {names[text]: i for text, i in vocabulary.items()}
    copy = type(model).from_str(json.dumps(said))
    for text, number in special.items():
        if copy.token_to_id(private_name(number)) != number:
            raise InputError(f"a message spells {text}, which this tokenizer cannot take for text")
    return copy
