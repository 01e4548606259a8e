"""Conversations in token ids against transformers' apply_chat_template; DPO on them as in TRL."""

import json
import shutil

import pytest
from chat_templates import CHATML, LLAMA2, LLAMA3, MISTRAL, MISTRAL_3
from helpers import real_input
from oracles import NO_ORACLE, smollm2_folder

from dpo_minimal import InputError
from dpo_minimal.data import encode_example
from dpo_minimal.formats.chat import QA_JINJA, write_template
from dpo_minimal.formats.conversations import Message
from dpo_minimal.tokenizer import load_tokenizer

transformers = pytest.importorskip("transformers", reason=NO_ORACLE)
pytest.importorskip("jinja2", reason=NO_ORACLE)
tokenizers = pytest.importorskip("tokenizers", reason=NO_ORACLE)

NAMES = ["llama3", "chatml", "mistral", "llama2"]
ONE = (Message("user", "Why is the sky blue?"),)
SYSTEM = (Message("system", "Answer in one line."), *ONE)
THREE = (
    *SYSTEM,
    Message("assistant", "Air scatters blue light the most.\n\n- Rayleigh, 1871"),
    Message("user", "And  the evening\tsky? 你好 😀"),
    Message("assistant", "Red: the way is longer."),
    Message("user", "[1] 42, really?"),
)
# Without runs of spaces, where transformers merges otherwise: see test_tokenizers.py.
SINGLE = (*THREE[:3], Message("user", "And the evening\tsky? 你好 😀"), *THREE[4:])
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ANSWERS = ("Yes.", "No \u2013 see (2):\n```\nx = 1\n```", "\u00e9\u00e9 <b>", "    four spaces  ")


def as_dicts(messages):
    """Messages as transformers wants them."""
    return [{"role": role, "content": content} for role, content in messages]


def check(folder, template, prompts, answers=ANSWERS):
    """Our ids are those of apply_chat_template, up to the end of the assistant's turn."""
    ours = load_tokenizer(folder, template)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for prompt in prompts:
        options = dict(chat_template=template, tokenize=True, return_dict=False)
        expected = theirs.apply_chat_template(
            as_dicts(prompt), add_generation_prompt=True, **options
        )
        ids, *scored = encode_example(ours, prompt, *answers)
        assert ids == expected
        for answer, found in zip(answers, scored, strict=True):
            joint = theirs.apply_chat_template(
                as_dicts((*prompt, Message("assistant", answer))), **options
            )
            assert joint[: len(ids) + len(found)] == ids + found, answer
            assert found[-1] == ours.eos_id and ours.eos_id not in found[:-1]
            behind = theirs.decode(joint[len(ids) + len(found) :])
            assert behind.strip() == "", behind  # ChatML's line break, or nothing
    return ours, theirs


def sentencepiece_folder(folder, **config):
    """The real Llama 2 tokenizer.model with a tokenizer_config.json."""
    shutil.copy(real_input("llama2_tokenizer.model"), folder / "tokenizer.model")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer"} | names | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("legacy", [True, False, None])
@pytest.mark.parametrize("template", [LLAMA2, MISTRAL], ids=["llama2", "mistral"])
def test_sentencepiece_with_a_chat_template(tmp_path, template, legacy):
    folder = sentencepiece_folder(tmp_path, **({} if legacy is None else {"legacy": legacy}))
    ours, _ = check(folder, template, [ONE, SYSTEM, SINGLE])
    assert ours.eos_id == 2


def test_llama_2_begins_as_meta_has_it(tmp_path):
    # <s> [INST] ... of Meta's own code: "▁[" is 518 and "INST" 25580
    folder = sentencepiece_folder(tmp_path, legacy=True)
    ids, _ = encode_example(load_tokenizer(folder, LLAMA2), ONE, "x")
    assert ids[:4] == [1, 518, 25580, 29962]


def test_a_template_that_loses_the_system_message_behind_an_answer_is_refused(tmp_path):
    # Mistral 7B v0.3 puts it into the last message if that is the user's: TRL would train on an
    # answer without it.
    tokenizer = load_tokenizer(sentencepiece_folder(tmp_path), MISTRAL_3)
    encode_example(tokenizer, SINGLE[1:], "x")
    with pytest.raises(InputError, match="not how its conversations begin"):
        encode_example(tokenizer, SYSTEM, "x")


def test_smollm2_instruct_in_its_own_template():
    folder = smollm2_folder()
    template = (folder / "chat_template.jinja").read_text("utf-8")
    ours, theirs = check(folder, template, [ONE, SYSTEM, THREE], ANSWERS[:3])
    assert ours.eos_id == theirs.convert_tokens_to_ids("<|im_end|>") == 2
    plain = "say <|im_end|> and <|im_start|>"
    ids, scored = encode_example(ours, (Message("user", plain),), plain)
    assert ids.count(2) == 2 and scored.count(2) == 1  # system and user, and the answer's own
    # as ordinary text: the ids of the two texts without any special tokens
    assert scored == [*ours.encode(plain), 2] and ours.decode(scored) == plain


def llama3_folder(folder):
    """A byte-level tokenizer.json with Llama 3's special tokens behind its vocabulary."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(LLAMA3_WORDS), "isolated")
    bytes_only = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, bytes_only])
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet)
    texts = ["why is the sky blue? it is the air\n\n", "user\n\nassistant\n\nsystem"] * 20
    model.train_from_iterator(texts, trainer)
    names = ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id")
    special = [tokenizers.AddedToken(f"<|{n}|>", special=True, normalized=False) for n in names]
    model.add_special_tokens(special)
    model.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin_of_text|> $A",
        special_tokens=[("<|begin_of_text|>", model.token_to_id("<|begin_of_text|>"))],
    )
    model.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("template", [LLAMA3, CHATML, MISTRAL, LLAMA2], ids=NAMES)
def test_a_llama_3_tokenizer(tmp_path, template):
    folder = llama3_folder(tmp_path)
    if template is CHATML:  # has none of its special tokens: nothing would end a turn
        with pytest.raises(InputError, match="no special token"):
            load_tokenizer(folder, template)
        return
    ours, theirs = check(folder, template, [ONE, SYSTEM, THREE], ANSWERS[:3])
    end = "<|eot_id|>" if template is LLAMA3 else "<|end_of_text|>"
    assert ours.eos_id == theirs.convert_tokens_to_ids(end)
    spelled = (Message("user", "a <|eot_id|> b"),)
    ids, scored = encode_example(ours, spelled, "c <|eot_id|>")
    assert ours.decode(scored).strip() == "c <|eot_id|>" and scored.count(ours.eos_id) == 1
    # the same text but for what is spelled: the special tokens are where they were
    plain, _ = encode_example(ours, (Message("user", "a X b"),), "c")
    known = {theirs.convert_tokens_to_ids(f"<|{n}|>") for n in ("eot_id", "start_header_id")}
    assert [i for i in ids if i in known] == [i for i in plain if i in known]


@pytest.mark.parametrize("folder_of", [sentencepiece_folder, llama3_folder])
def test_the_blogs_text_as_a_template_is_our_text(tmp_path, folder_of):
    folder = folder_of(tmp_path)
    write_template(folder, None)
    ours, theirs = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    prompt, scored = encode_example(ours, "Why is it?", "It is.")
    question = [{"role": "user", "content": "Why is it?"}]
    options = dict(tokenize=False)
    text = theirs.apply_chat_template(question, add_generation_prompt=True, **options)
    assert text == f"{theirs.bos_token}Question: Why is it?\n\nAnswer:"
    answered = [*question, {"role": "assistant", "content": "It is."}]
    joint = theirs.apply_chat_template(answered, **options)
    assert joint == f"{text} It is.{theirs.eos_token}"
    if folder_of is llama3_folder:
        ids = theirs.apply_chat_template(answered, tokenize=True, return_dict=False)
        assert ids == prompt + scored
    for more in (answered + question, [{"role": "system", "content": "x"}, *question]):
        with pytest.raises(Exception, match="one question and its answer"):
            theirs.apply_chat_template(more, tokenize=False)
    assert theirs.chat_template == QA_JINJA.strip("\n") or theirs.chat_template == QA_JINJA
