"""SentencePiece with Llama's settings, and tokenizer.json behind the same five names."""

import json

import pytest

from dpo_minimal import InputError, forum
from dpo_minimal.tokenizer import Tokenizer, load_tokenizer, train_tokenizer

TEXTS = [
    "What is a baby goat called?",
    "Topic: one\nReply: two\n\nReply: three",
    "  two spaces,  inside too  ",
    "tab\there, é, 你好, 😀, ﬁ, Å",
    "2024 and 3.14",
    "<s> and </s> are text",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back_as_it_was(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == text


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back_from_the_tokenizer_of_llama_2(llama2_tokenizer, text):
    assert llama2_tokenizer.decode(llama2_tokenizer.encode(text)) == text


def test_bos_and_eos_are_there_when_asked_for_and_spelling_them_is_text(tokenizer):
    ids = tokenizer.encode("a goat")
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    assert bos != eos and min(bos, eos) >= 0
    assert tokenizer.encode("a goat", bos=True) == [bos, *ids]
    assert tokenizer.encode("a goat", eos=True) == [*ids, eos]
    assert tokenizer.encode("a goat", bos=True, eos=True) == [bos, *ids, eos]
    assert {bos, eos} & set(tokenizer.encode("<s> a goat </s>")) == set()


def test_unknown_characters_are_their_bytes(tokenizer):
    # Llama numbers the bytes 3 to 258, behind unknown, BOS and EOS; 3 + 0xF0 = 243.
    assert tokenizer.encode("😀")[-4:] == [3 + byte for byte in "😀".encode()]


def test_digits_are_tokens_of_their_own(tmp_path):
    texts = ["in 2024 we had 2024 goats"] * 50 + [forum.TOPICS[0].remark]
    tokenizer = train_tokenizer(texts, 300, tmp_path / "tokenizer.model")
    pieces = [tokenizer.model.id_to_piece(i) for i in range(tokenizer.vocab_size)]
    joined = [p for p in pieces if len(p) > 1 and p[0] != "<" and any(map(str.isdigit, p))]
    assert joined == []
    assert [tokenizer.decode([i]) for i in tokenizer.encode("2024")[-4:]] == list("2024")


def test_a_line_break_is_one_byte(tokenizer):
    one, two = tokenizer.encode("a\nb"), tokenizer.encode("a\n\nb")
    assert one.count(3 + 0x0A) == 1 and two.count(3 + 0x0A) == 2
    assert tokenizer.model.id_to_piece(3 + 0x0A) == "<0x0A>"


def test_llama_2_has_the_published_ids(llama2_tokenizer):
    assert llama2_tokenizer.vocab_size == 32000
    assert (llama2_tokenizer.bos_id, llama2_tokenizer.eos_id) == (1, 2)
    # "Hello world" on Llama 2 is the two tokens 15043 and 3186, a widely known example.
    assert llama2_tokenizer.encode("Hello world", bos=True) == [1, 15043, 3186]


def test_training_twice_gives_the_same_file(tmp_path):
    texts = [row["text"] for row in forum.make_forum(0)["pretrain"][:100]]
    files = [tmp_path / "one.model", tmp_path / "two.model"]
    for path in files:
        tokenizer = train_tokenizer(iter(texts), 380, path)
        assert tokenizer.vocab_size == 380
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    path = tmp_path / "tokenizer.model"
    with pytest.raises(InputError, match="tokenizer.model"):
        Tokenizer(path)
    path.write_bytes(b"not a model")
    with pytest.raises(InputError, match="not a SentencePiece model"):
        load_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(InputError, match="no tokenizer.model and no tokenizer.json"):
        load_tokenizer(tmp_path)


# tokenizer.json


def json_folder(folder, **config):
    """A folder with a byte-level tokenizer.json whose specials are <|bos|> 0 and <|eos|> 1."""
    tokenizers = pytest.importorskip("tokenizers", reason="needs pip install tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|bos|>", "<|eos|>"], initial_alphabet=alphabet
    )
    model.train_from_iterator(["what is a goat called?"] * 20, trainer)
    # A post-processor that adds its own BOS, as Llama 3's does: encode must not double it.
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]
    )
    model.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<|bos|>", "eos_token": {"content": "<|eos|>"}} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


@pytest.mark.parametrize("text", TEXTS)
def test_a_tokenizer_json_gives_any_text_back(tmp_path, text):
    tokenizer = load_tokenizer(json_folder(tmp_path))
    ids = tokenizer.encode(text, bos=True, eos=True)
    assert ids[0] == 0 == tokenizer.bos_id and ids[-1] == 1 == tokenizer.eos_id
    assert ids[1:-1] == tokenizer.encode(text) and not {0, 1} & set(ids[1:-1])
    assert tokenizer.decode(ids) == text


def test_text_that_spells_a_special_token_of_a_tokenizer_json_is_text(tmp_path):
    tokenizer = load_tokenizer(json_folder(tmp_path))
    ids = tokenizer.encode("say <|eos|> now")
    assert {0, 1} & set(ids) == set()
    assert tokenizer.decode(ids) == "say <|eos|> now"


def test_a_tokenizer_json_without_a_known_eos_is_refused(tmp_path):
    for wrong in (None, "<|other|>"):
        with pytest.raises(InputError, match="no eos_token"):
            load_tokenizer(json_folder(tmp_path, eos_token=wrong))


def test_a_damaged_tokenizer_json_is_refused(tmp_path):
    json_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(InputError, match="tokenizer.json"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_model_is_preferred_to_a_tokenizer_json(tmp_path, tokenizer_file):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
    assert isinstance(load_tokenizer(tmp_path), Tokenizer)
