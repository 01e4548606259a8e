"""Token ids against transformers' tokenizers: Llama 2's real model file, SmolLM2's, one of ours."""

import json
import shutil
from functools import partial

import pytest
from helpers import real_input
from oracles import NO_ORACLE, smollm2_folder

from dpo_minimal import forum
from dpo_minimal.data import encode_example
from dpo_minimal.tokenizer import load_tokenizer

transformers = pytest.importorskip("transformers", reason=NO_ORACLE)
tokenizers = pytest.importorskip("tokenizers", reason=NO_ORACLE)

TEXTS = [
    *("", "a", "Hello world", "Question: x?\n\nAnswer:", "Answer: ", "end\n", "\n\nx", "a\r\nb"),
    *(
        "12345 3.14 1e-5 ٣",
        "é e\u0301 ﬁ",
        "日本語のテキスト",
        "🙂🏽 ok",
        "tab\there",
        "x\u00a0y\u2028z",
    ),
    *("\x00\x7f", "<0x0A>", "</p>", "don't", "ÅngstrÖm", "a" * 300, "[INST] hi [/INST]"),
]
SPACES = [
    *(" x", "  x", "   x", "a  b", "a   b", "a    b", "trailing  ", " ", "  ", "    "),
    *("  def f():\n    return  1\n", "x\n        y", "a \n b", "| a  | b   |", "\t  x"),
]
SPECIAL = ["<s>", "</s>", "<unk>", "<s> hi </s>", "a<s>b"]


@pytest.fixture(scope="module")
def llama2_folder(tmp_path_factory):
    """A folder with the real Llama 2 tokenizer.model alone."""
    folder = tmp_path_factory.mktemp("llama2")
    shutil.copy(real_input("llama2_tokenizer.model"), folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def real_texts():
    """Every text of 1,100 real preference pairs."""
    rows = json.loads(real_input("instruction_preferences.json").read_text("utf-8"))
    return [text for row in rows for text in row.values() if text]


def published_llama2(folder, ours):
    """The Llama 2 tokenizer as its published tokenizer.json builds it, in the package tokenizers.

    transformers 5.23 makes another one of a tokenizer.model: it tries the merges in the order of
    their ids, while the file gives "▁▁" and its like the lowest of all scores; and it puts no space
    in front of a text that begins with one. Both show in runs of spaces only.
    """
    theirs = transformers.LlamaTokenizer.from_pretrained(folder)
    model = json.loads(theirs.backend_tokenizer.to_str())["model"]
    vocabulary = model["vocab"]

    def score(merge):
        return ours.model.get_score(vocabulary["".join(merge)])

    merges = sorted(map(tuple, model["merges"]), key=score, reverse=True)
    bpe = tokenizers.models.BPE(vocabulary, merges, fuse_unk=True, byte_fallback=True)
    built = tokenizers.Tokenizer(bpe)
    steps = [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    built.normalizer = tokenizers.normalizers.Sequence(steps)
    return built


def assert_same_ids(texts, ours, expected):
    """`ours` and `expected`: functions from a text to its ids."""
    different = [text for text in texts if ours(text) != expected(text)]
    assert not different, f"{len(different)} of {len(texts)}: {different[0]!r}"


def test_llama_2_ids_are_those_of_transformers(llama2_folder, real_texts):
    ours = load_tokenizer(llama2_folder)
    theirs = transformers.LlamaTokenizer.from_pretrained(llama2_folder)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)
    assert ours.vocab_size == len(theirs) == 32000
    plain = [text for text in TEXTS + real_texts if "  " not in text and not text.startswith(" ")]
    assert len(plain) > 3000
    expected = partial(theirs.encode, add_special_tokens=False)
    assert_same_ids(plain, ours.encode, expected)
    for text in plain[:1000]:
        ids = ours.encode(text, bos=True, eos=True)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == text


def test_llama_2_ids_of_all_texts_are_those_of_the_published_merges(llama2_folder, real_texts):
    ours = load_tokenizer(llama2_folder)
    theirs = published_llama2(llama2_folder, ours)
    # SentencePiece puts no space in front of nothing; a spelled special token is text in both.
    texts = [text for text in TEXTS + SPACES + SPECIAL + real_texts if text]
    assert_same_ids(texts, ours.encode, lambda text: theirs.encode(text).ids)


def test_prompt_and_answer_of_real_pairs_join_as_in_transformers(llama2_folder, real_texts):
    ours = load_tokenizer(llama2_folder)
    theirs = published_llama2(llama2_folder, ours)
    for answer in [text for text in TEXTS + SPACES + real_texts[:1000] if text]:
        prompt, scored = encode_example(ours, "Why?", answer)
        text = f"Question: Why?\n\nAnswer: {answer}"
        assert prompt == [1, *theirs.encode("Question: Why?\n\nAnswer:").ids]
        assert prompt + scored == [1, *theirs.encode(text).ids, 2]


def test_auto_tokenizer_gives_our_ids_for_a_tokenizer_made_here(tokenizer_file, tokenizer):
    # train_tokenizer wrote the folder. Called as users call it, theirs puts a BOS in front and no
    # EOS behind: a prompt with an EOS would already be at its end.
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer_file.parent)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    assert len(theirs) == tokenizer.vocab_size == 420
    threads = [row["text"] for row in forum.make_forum(0)["pretrain"][300:600]]  # not learned from
    plain = [text for text in TEXTS if "  " not in text and not text.startswith(" ")]
    expected = partial(tokenizer.encode, bos=True)
    assert_same_ids(plain + threads, lambda text: theirs(text).input_ids, expected)
    for text in plain + threads:
        assert theirs.decode(theirs(text).input_ids, skip_special_tokens=True) == text


def test_smollm2_ids_are_those_of_auto_tokenizer(real_texts):
    folder = smollm2_folder()
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.vocab_size == len(theirs)
    special = ["<|im_end|>", "a<|im_start|>user\nb"]
    texts = TEXTS + SPACES + SPECIAL + special + real_texts

    def expected(text):
        return theirs.encode(text, add_special_tokens=False, split_special_tokens=True)

    assert_same_ids(texts, ours.encode, expected)
    for text in texts[:500]:
        ids = ours.encode(text, bos=True, eos=True)
        assert ids == [ours.bos_id, *expected(text), ours.eos_id]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == text
