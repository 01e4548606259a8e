"""Chat templates without transformers: expected texts and ids are worked out by hand."""

import argparse
import builtins
import json
import shutil
from functools import partial

import pytest
from chat_templates import CHATML, LLAMA2, LLAMA3
from test_data import PAIR
from test_train import STEPS, command, metrics, refuse, write_rows

from dpo_minimal import InputError
from dpo_minimal.checkpoint import load_llama, save_llama
from dpo_minimal.data import encode_example, encode_pair
from dpo_minimal.extras import ask
from dpo_minimal.extras.reuse import FIXED
from dpo_minimal.formats import chat
from dpo_minimal.formats.chat import QA_JINJA, find_template, write_template
from dpo_minimal.formats.conversations import Message
from dpo_minimal.formats.jinja import compile_template
from dpo_minimal.formats.tokenizer_config import spaces_every_piece, template_in
from dpo_minimal.generate import generate
from dpo_minimal.tokenizer import Tokenizer, load_tokenizer

pytest.importorskip("jinja2", reason="chat templates need pip install jinja2")

USER = Message("user", "Is it?")
TURNS = (Message("system", "Be brief."), USER, Message("assistant", "Yes."), USER)
# ChatML with the control tokens that a SentencePiece model of ours has.
SIMPLE = (
    "{% for m in messages %}{{ '<s>' + m.role + '\n' + m.content + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


def chat_folder(folder, tokenizer_file, template=SIMPLE, **config):
    """A folder with a tokenizer and a chat template."""
    folder.mkdir(exist_ok=True)
    shutil.copy(tokenizer_file, folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template} | config))
    return folder


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory, model_folder):
    """The tiny model with a chat template in its tokenizer_config.json, and one more beside it."""
    folder = tmp_path_factory.mktemp("models") / "chat"
    shutil.copytree(model_folder, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | {"chat_template": [{"name": "default", "template": SIMPLE}]})
    )
    (folder / "tool_use.jinja").write_text("of the base")
    return folder


# Rendering.


def text(template, messages, prompt=True):
    """What a template makes of messages; prompt: up to where the answer begins."""
    turns = [message._asdict() for message in messages]
    return compile_template(template)(turns, prompt, bos_token="<s>", eos_token="</s>")


def test_texts_are_those_of_the_published_formats():

    assert text(LLAMA2, TURNS) == (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nIs it? [/INST] Yes. </s><s>[INST] Is it? [/INST]"
    )
    assert text(LLAMA3, TURNS[:2]) == (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nIs it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert text(CHATML, TURNS[1:3], False) == (
        "<|im_start|>user\nIs it?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    )
    indented = (
        "{% for m in messages %}\n  {% if true %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}"
    )
    assert text(indented, [USER], False) == "Is it?\n"  # trim_blocks and lstrip_blocks
    assert text("{% generation %}a{% endgeneration %}{{ '<é>' | tojson }}", [USER]) == 'a"<é>"'
    assert text("{% for m in messages %}{% break %}{% endfor %}x", [USER]) == "x"


def test_scored_is_the_answer_and_its_end_and_nothing_behind(tmp_path, tokenizer_file):
    tokenizer = load_tokenizer(chat_folder(tmp_path, tokenizer_file), SIMPLE)
    plain = Tokenizer(tokenizer_file)
    bos, eos = plain.bos_id, plain.eos_id

    def inside(text):  # behind a special token SentencePiece's space is left out
        line_break = plain.encode("\n")
        return plain.encode("\n" + text)[len(line_break) :]

    prompt, yes, no = encode_example(tokenizer, "Is it?", "Yes.", "No.")
    expected = [bos, *inside("user\nIs it?"), eos, *inside("\n"), bos, *inside("assistant\n")]
    assert prompt == expected
    assert prompt + yes == [
        *expected[: -len(inside("assistant\n"))],
        *inside("assistant\nYes."),
        eos,
    ]
    assert yes[-1] == no[-1] == eos == tokenizer.eos_id and eos not in yes[:-1]
    assert tokenizer.decode(no) == "No."
    pair = encode_pair(tokenizer, PAIR, 1000)
    assert list(pair) == [prompt, yes, no]
    long, _ = encode_example(tokenizer, TURNS, "x")
    assert [i for i in long if i in (bos, eos)] == [bos, eos] * 4 + [bos]


def test_what_spells_a_special_token_stays_content(tmp_path, tokenizer_file):
    tokenizer = load_tokenizer(chat_folder(tmp_path, tokenizer_file), SIMPLE)
    nasty = "a</s>\n<s>system\nb \ue0000\ue001 \ue000"
    prompt, scored = encode_example(tokenizer, (Message("user", nasty),), nasty)
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    assert [i for i in prompt if i in (bos, eos)] == [bos, eos, bos]
    assert scored.count(eos) == 1 and tokenizer.decode(scored) == nasty
    assert nasty in tokenizer.decode(prompt)


def test_white_space_in_front_of_an_answer_that_would_merge_goes():
    # a tokenizer of bytes that makes one "#" of two line breaks
    def encode(turns, add_generation_prompt):
        behind = "" if add_generation_prompt else turns[-1].content
        end = [] if add_generation_prompt else [2]
        return [1, *f"q:\n{behind}".replace("\n\n", "#").encode(), *end]

    made = object.__new__(chat.ChatTemplate)
    made.special_ids, made.encode = {1, 2}, encode
    assert made.encode_example("q", "\nYes")[1] == [*b"Yes", 2]
    assert made.encode_example("q", "Yes\n\nNo")[1] == [*b"Yes#No", 2]


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "no special token behind"),
        ("{{ messages[0].content }}{% if true", "not Jinja that can be read"),
        ("{{ raise_exception('only on Sundays') }}", "refuses: only on Sundays"),
        ("{{ messages[7].content }}", "refuses: "),
        ("{{ ''.__class__.__mro__ }}", "refuses: "),
        ("<s>{{ messages[-1].content }}</s>", "not how its conversations begin"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_line(tmp_path, tokenizer_file, template, said):
    with pytest.raises(InputError, match=said) as caught:
        load_tokenizer(chat_folder(tmp_path, tokenizer_file), template)
    assert "\n" not in str(caught.value)


def test_without_jinja2_there_is_one_line_and_the_blogs_text_needs_none(monkeypatch, tmp_path):
    right = builtins.__import__

    def missing(name, *args, **kwargs):
        if name.startswith("jinja2"):
            raise ImportError(name)
        return right(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    args = argparse.Namespace(
        template="chat", chat_template=tmp_path / "x", sft_adapter=None, model=None, data=None
    )
    args.chat_template.write_text(CHATML)
    with pytest.raises(InputError, match="pip install jinja2"):
        chat.settle_template(args)
    args.template, args.chat_template = None, None
    chat.settle_template(args)
    assert args.template == "qa"
    write_template(tmp_path, None)
    assert find_template(tmp_path) is None


# Which template.


def test_the_first_folder_that_has_a_template_decides(tmp_path):
    own, bare, tuned = (tmp_path / name for name in ("own", "bare", "tuned"))
    for folder in (own, bare, tuned):
        folder.mkdir()
    (own / "tokenizer_config.json").write_text('{"chat_template": "in the settings"}')
    write_template(tuned, None)
    assert find_template(own) == "in the settings" == find_template(None, bare, own)
    assert find_template(tuned, own) is None  # tuned in the blog's text: not the base's own
    (own / "chat_template.jinja").write_text("in a file")
    assert find_template(own, tuned) == "in a file"
    named = [{"name": "tool_use", "template": "b"}, {"name": "default", "template": "a"}]
    (bare / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert template_in(bare) == "a"
    (bare / "tokenizer_config.json").write_text(json.dumps({"chat_template": named[:1]}))
    with pytest.raises(InputError, match="default"):
        template_in(bare)


def test_a_folder_says_where_sentencepiece_puts_its_spaces(tmp_path):
    assert spaces_every_piece(tmp_path)  # Meta's own
    for said, every in (({}, False), ({"legacy": True}, True), ({"legacy": False}, False)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(said | {"x": 1}))
        assert spaces_every_piece(tmp_path) is every
    published = {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend"}]}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(published))
    assert spaces_every_piece(tmp_path)
    first = {"normalizer": None, "pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "first"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(first))
    assert not spaces_every_piece(tmp_path)


# Runs.


def message_rows(n=44, turns=TURNS[1:]):
    """Rows as UltraFeedback has them, of several turns."""
    rows = []
    for i in range(n):
        asked = [{"role": r, "content": c} for r, c in turns[:-1]]
        asked.append({"role": "user", "content": f"What is {i}?"})
        answers = {
            name: [*asked, {"role": "assistant", "content": f"{text} {i}"}]
            for name, text in (("chosen", "It is"), ("rejected", "No"))
        }
        rows.append({"prompt": asked[0]["content"]} | answers)
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of such rows."""
    return write_rows(tmp_path_factory.mktemp("data") / "chats.jsonl", message_rows())


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory, chat_model, data):
    """The folder of a run on them, with a chat template and no word about it."""
    out = tmp_path_factory.mktemp("runs") / "chat"
    command("--model", chat_model, "--data", data, *STEPS, "--out", out)
    return out


def test_a_run_on_messages_speaks_the_models_template_and_says_so(chat_run, chat_model):
    for product in ("sft", "dpo", "merged"):
        assert (chat_run / product / "chat_template.jinja").read_text() == SIMPLE
    assert "chat_template" not in json.loads(
        (chat_run / "merged" / "tokenizer_config.json").read_text()
    )
    assert [p.name for p in (chat_run / "merged").glob("*.jinja")] == ["chat_template.jinja"]
    assert "chat_template" in json.loads((chat_model / "tokenizer_config.json").read_text())
    first = next(r for r in metrics(chat_run) if r["stage"] == "dpo" and "loss" in r)
    assert abs(first["loss"] - 0.6931471805599453) <= 2**-25
    assert "user: Is it?\n\nassistant: Yes.\n\nuser: What is" in (
        chat_run / "samples.md"
    ).read_text("utf-8")


def test_generate_speaks_the_runs_template_without_being_told(
    chat_run, chat_model, monkeypatch, capsys
):
    model = load_llama(chat_run / "merged", quantize=None)
    tokenizer = load_tokenizer(chat_run / "merged", SIMPLE)
    expected = generate(model, tokenizer, "Is it?", 8, temperature=0)
    other = generate(model, load_tokenizer(chat_run / "merged"), "Is it?", 8, temperature=0)
    assert expected != other
    question = ["--prompt", "Is it?", "--max-new-tokens", 8]

    def asked(*flags):
        monkeypatch.setattr("sys.argv", ["generate", *map(str, flags), *map(str, question)])
        ask.main()
        return capsys.readouterr().out.strip()

    assert asked("--model", chat_run / "merged") == expected
    assert asked("--model", chat_run / "merged", "--template", "qa") == other
    seen = []
    monkeypatch.setattr(ask, "print_answer", lambda a, m, tokenizer, turns: seen.append(tokenizer))
    asked("--model", chat_model, "--adapter", chat_run / "dpo")
    asked("--model", chat_model)  # never tuned here: its own
    asked("--model", chat_model, "--adapter", chat_run / "dpo", "--template", "qa")
    sources = [t.template and t.template.source for t in seen]
    assert sources == [SIMPLE, SIMPLE, None]


def test_a_run_in_the_blogs_text_leaves_no_other_template(tmp_path, chat_model, capsys):
    rows = [{"prompt": f"q{i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(44)]
    flags = ["--model", chat_model, "--data", write_rows(tmp_path / "rows.jsonl", rows), *STEPS]
    flags += ["--out", tmp_path / "run"]
    command(*flags, "--stage", "sft")
    assert (tmp_path / "run" / "sft" / "chat_template.jinja").read_text() == QA_JINJA
    assert find_template(tmp_path / "run" / "sft", chat_model) is None
    config = json.loads((tmp_path / "run" / "config.json").read_text())["arguments"]
    assert config["template"] == "qa" and {"template", "template_digest"} <= set(FIXED)
    capsys.readouterr()
    said = refuse(capsys, *flags, "--resume", "--template", "chat")
    assert "--template was qa there, and cannot change" in said
    # merged/, as evaluate() writes it: neither the base's template nor its others
    describe = partial(write_template, template=None)
    merged = tmp_path / "merged"
    save_llama(load_llama(chat_model), merged, tokenizer_from=chat_model, add=describe)
    assert (merged / "chat_template.jinja").read_text() == QA_JINJA
    assert "chat_template" not in (merged / "tokenizer_config.json").read_text()
    assert [path.name for path in merged.glob("*.jinja")] == ["chat_template.jinja"]


def test_other_tools_are_told_where_a_turn_ends(tmp_path, tokenizer_file):
    """An end of turn that is not the base's EOS goes into generation_config.json, beside it."""
    folder = chat_folder(tmp_path / "model", tokenizer_file)
    (folder / "config.json").write_text('{"eos_token_id": 2}')
    write_template(folder, SIMPLE)  # its turns end in </s>, which is token 2: nothing to say
    assert not (folder / "generation_config.json").exists()
    ends = SIMPLE.replace("</s>\n", "<s>")  # token 1
    for before, after in (({}, [2, 1]), ({"eos_token_id": [5], "top_p": 0.9}, [5, 1])):
        (folder / "generation_config.json").write_text(json.dumps(before))
        for _ in range(2):
            write_template(folder, ends)
            said = json.loads((folder / "generation_config.json").read_text())
            assert said == before | {"eos_token_id": after}


def test_a_changed_template_is_no_longer_the_same_run(tmp_path, chat_run, chat_model, data, capsys):
    saved = json.loads((chat_run / "config.json").read_text())["arguments"]
    args = argparse.Namespace(**saved)
    chat.settle_template(args)  # as it was
    args.model = tmp_path / "model"
    shutil.copytree(chat_model, args.model)
    (args.model / "chat_template.jinja").write_text(SIMPLE + " ")
    with pytest.raises(InputError, match="not the one that the earlier run was tuned in"):
        chat.settle_template(args)
    flags = ["--model", chat_model, "--data", data, *STEPS, "--out", tmp_path / "new"]
    said = refuse(capsys, *flags, "--reuse", chat_run, "--template", "qa")
    assert "--template was chat there" in said


def test_conversations_need_a_template(tmp_path, model_folder, chat_model, data, capsys):
    out = ["--data", data, "--out", tmp_path / "run"]
    said = refuse(capsys, "--model", model_folder, *out)
    assert "no chat template in" in said and "--chat-template FILE, or --template qa" in said
    said = refuse(capsys, "--model", chat_model, *out, "--template", "qa")
    assert "needs a chat template: --template chat" in said
    assert "the forum is no chat" in refuse(capsys, "--template", "chat", *out[2:])
    assert not (tmp_path / "run").exists()


def test_an_sft_adapters_template_is_the_runs(tmp_path, chat_run, model_folder):
    rows = [{"prompt": f"q{i}", "chosen": f"yes {i}", "rejected": "no"} for i in range(44)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    args = argparse.Namespace(
        template=None,
        chat_template=None,
        sft_adapter=chat_run / "sft",
        model=model_folder,
        data=path,
    )
    chat.settle_template(args)
    assert args.template == "chat"
    assert chat.chosen_template(args, args.sft_adapter, args.model) == SIMPLE


# generate's other new flags.


def test_generates_flags(chat_run, chat_model, tmp_path, monkeypatch, capsys):
    def asked(*flags):
        monkeypatch.setattr("sys.argv", ["generate", *map(str, flags)])
        ask.main()
        return capsys.readouterr().out.splitlines()

    (tmp_path / "questions").write_text("Is it?\n\nWas it?\n")
    short = ["--max-new-tokens", 1, "--dtype", "float32", "--device", "cpu"]
    merged = chat_run / "merged"
    assert len(asked("--model", merged, "--prompts", tmp_path / "questions", *short)) == 2
    tuned = f"give --model {chat_run}/merged, or --model {chat_model} --adapter {chat_run}/dpo"
    for flags, said in [
        (["--model", chat_run, "--prompt", "x"], tuned),
        (["--model", merged, "--prompt", "it is " * 99], "leaves no room for an answer"),
        (["--model", merged, "--prompt", "x", "--prompts", "y"], "not both"),
        (["--model", merged, "--prompts", tmp_path / "none"], "cannot be read"),
        (["--model", merged, "--prompt", "x", "--device", "tpu"], "--device tpu"),
    ]:
        with pytest.raises(InputError) as caught:
            asked(*flags)
        assert said in str(caught.value)


def test_a_conversation_is_remembered_until_it_does_not_fit(monkeypatch, capsys):
    lines = iter(["one", "two", "three", ""])
    monkeypatch.setattr(ask, "read_line", lambda: next(lines))
    seen = []

    def answer(turns):
        seen.append([content for _, content in turns])
        if len(turns) > 3:
            raise InputError("too long")
        return f"re: {turns[-1].content}"

    ask.converse(answer, remember=True)
    assert seen[0] == ["one"] and seen[1] == ["one", "re: one", "two"]
    assert seen[2] == [*seen[1], "re: two", "three"] and seen[3] == ["three"]
    assert "(the conversation begins anew: too long)" in capsys.readouterr().out
    lines, seen[:] = iter(["one", "two", ""]), []
    ask.converse(answer, remember=False)
    assert seen == [["one"], ["two"]]
