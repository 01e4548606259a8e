"""Rows of messages in the forms that data sets have, and CSV; what would be lost is refused."""

import pytest
from test_data import PAIR, PLAIN, write_rows

from dpo_minimal import InputError
from dpo_minimal.data import PreferencePair, format_prompt, load_pairs, load_splits
from dpo_minimal.extras import large
from dpo_minimal.formats.conversations import (
    Message,
    as_messages,
    pack_prompt,
    spoken,
    unpack_prompt,
)
from dpo_minimal.formats.csv import read_csv
from dpo_minimal.formats.rows import pair_of

USER, SYSTEM = Message("user", "Is it?"), Message("system", "Be brief.")
EARLIER = (Message("user", "Hi"), Message("assistant", "Hello"))
ASKED = {"role": "user", "content": "Is it?"}
HI = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
BRIEF = {"role": "system", "content": "Be brief."}


def said(text):
    """An answer as a list of one message."""
    return [{"role": "assistant", "content": text}]


def inside(*turns):
    """A row with the prompt inside both answers."""
    return {"chosen": [*turns, *said("Yes.")], "rejected": [*turns, *said("No.")]}


def sharegpt(role, text):
    """A message in ShareGPT's words."""
    return {"from": role, "value": text}


ROWS = {
    "UltraFeedback": ({"prompt": "Is it?", "messages": []} | inside(ASKED), (USER,)),
    "implicit": (inside(BRIEF, *HI, ASKED), (SYSTEM, *EARLIER, USER)),
    "UltraFeedback, turns": ({"prompt": "Hi"} | inside(*HI, ASKED), (*EARLIER, USER)),
    "explicit": (
        {"prompt": [BRIEF, ASKED], "chosen": said("Yes."), "rejected": said("No.")},
        (SYSTEM, USER),
    ),
    "explicit, texts": (PLAIN | {"prompt": [*HI, ASKED]}, (*EARLIER, USER)),
    "text and lists": ({"prompt": "Is it?", "chosen": said("Yes."), "rejected": "No."}, (USER,)),
    "ShareGPT": (
        {
            "conversations": [
                sharegpt("system", "Be brief."),
                sharegpt("human", "Hi"),
                sharegpt("gpt", "Hello"),
                sharegpt("human", "Is it?"),
            ],
            "chosen": sharegpt("gpt", "Yes."),
            "rejected": sharegpt("gpt", "No."),
        },
        (SYSTEM, *EARLIER, USER),
    ),
    "system": (PLAIN | {"system": "Be brief."}, (SYSTEM, USER)),
    "system_prompt, messages": ({"system_prompt": "Be brief."} | inside(ASKED), (SYSTEM, USER)),
    "history": (PLAIN | {"history": [["Hi", "Hello"]]}, (*EARLIER, USER)),
    "both": (
        PLAIN | {"history": [["Hi", "Hello"]], "system": "Be brief."},
        (SYSTEM, *EARLIER, USER),
    ),
    "question": ({"question": "Is it?", "chosen": "Yes.", "rejected": "No."}, "Is it?"),
    "orca": (
        {"system": "Be brief.", "question": "Is it?", "chosen": "Yes.", "rejected": "No."},
        (SYSTEM, USER),
    ),
    "empty context": (PLAIN | {"system": "", "history": [], "tools": None}, "Is it?"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_becomes_one_form(tmp_path, name):
    row, prompt = ROWS[name]
    pair = PreferencePair(prompt, "Yes.", "No.")
    pairs = load_pairs(write_rows(tmp_path / "rows.jsonl", [row]), str)
    assert pairs == [pair] and {pairs[0]: 1}[pair] == 1
    assert pair_of("here", row) == tuple(pair)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (inside(), "no prompt, and no message before the last one"),
        (inside(*HI), "the message before the answer is the assistant's"),
        ({"prompt": "Other?"} | inside(ASKED), "the prompt is not among the messages of 'chosen'"),
        ({"prompt": [BRIEF, ASKED]} | inside(ASKED), "the prompt is not among the messages"),
        (inside(ASKED) | {"rejected": [*HI, ASKED, *said("No.")]}, "differ before their last"),
        (PLAIN | {"chosen": [ASKED]}, "the last message of 'chosen' is not the assistant's"),
        (PLAIN | {"chosen": []}, "'chosen' is list, not text or messages"),
        ({"prompt": "Is it?", "chosen": said("Yes.")}, "'rejected' is missing"),
        (inside({"role": "tool", "content": "3"}, ASKED), "has the role 'tool': known are"),
        (inside({"role": "user", "content": [{"type": "image"}]}), "content that is list"),
        (inside(ASKED) | {"tools": ["search"]}, "the row has tools"),
        (inside(ASKED | {"tool_calls": [1]}), "calls tools"),
        (inside(*HI, ASKED) | {"history": [["a", "b"]]}, "earlier turns in its prompt and"),
        (inside(BRIEF, ASKED) | {"system": "Be long."}, "two system messages"),
        (PLAIN | {"history": "Hi"}, "history a list of"),
        (PLAIN | {"history": [["Hi"]]}, "history a list of"),
        (PLAIN | {"system": ["a"]}, "system should be a text"),
        (inside({"role": "user", "content": "\ud800"}), "not valid Unicode"),
        (PLAIN | {"prompt": "<|im_start|>user\nIs it?<|im_end|>\n"}, "in a chat template already"),
        (PLAIN | {"prompt": " <s>[INST] Is it? [/INST]"}, "in a chat template already"),
    ],
)
def test_what_would_be_lost_is_refused_with_its_place(row, message):
    with pytest.raises(InputError, match=message) as caught:
        pair_of("file, line 7", row)
    assert str(caught.value).startswith("file, line 7") and "\n" not in str(caught.value)


def test_in_the_blogs_text_one_question_is_read_and_further_turns_are_refused():
    assert format_prompt((USER,)) == format_prompt("Is it?") == "Question: Is it?\n\nAnswer:"
    for prompt in ((SYSTEM, USER), (*EARLIER, USER)):
        with pytest.raises(InputError, match="--template chat"):
            format_prompt(prompt)


def test_a_dialogue_of_hh_is_turns_in_a_chat_and_a_swallowed_turn_is_noticed(tmp_path):
    start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Is it?\n\nAssistant:"
    rows = [{"chosen": f"{start} Yes.", "rejected": f"{start} No."}]
    swallowed = {"chosen": f"{start} Yes.\n\nHuman: Why?", "rejected": f"{start} No."}
    log = []
    pairs = load_pairs(write_rows(tmp_path / "hh.jsonl", [*rows, swallowed]), log.append)
    assert [pair[1:] for pair in pairs] == [("Yes.", "No.")]
    assert as_messages(pairs[0].prompt) == (*EARLIER, USER)
    place = f"{tmp_path / 'hh.jsonl'}, line 2"
    expected = f"dropped 1 with a further turn inside an answer, the first at {place}"
    assert log == [f"{tmp_path / 'hh.jsonl'}: {expected}"]
    assert as_messages("Say Assistant: please") == (Message("user", "Say Assistant: please"),)


def test_equal_conversations_are_held_out_together_and_learned_once(tmp_path):
    rows = []
    for i in range(60):
        turns = {"role": "user", "content": f"q{i // 2}"}
        for text in (f"No {i}.", f"Never {i}."):
            rows.append({"chosen": [turns, *said("Yes.")], "rejected": [turns, *said(text)]})
    splits = load_splits(write_rows(tmp_path / "rows.jsonl", rows), log=str)
    held_out = {pair.prompt for pair in splits.evaluation}
    assert held_out and not held_out & {pair.prompt for pair in splits.train}
    assert len(splits.train) + len(splits.evaluation) == 120
    assert len(splits.sft) == len({pair.prompt for pair in splits.train})


def test_conversations_come_back_from_the_disk(monkeypatch):
    prompts = ["Is it?", "\0odd", '["a"]', (USER,), (SYSTEM, *EARLIER, Message("user", "é\n\0"))]
    assert [unpack_prompt(pack_prompt(prompt)) for prompt in prompts] == prompts
    monkeypatch.setattr(large, "SMALL", 10)
    pairs = [PreferencePair(prompt, "Yes.", "No.") for prompt in prompts]
    kept = large.keep(iter(pairs))
    assert isinstance(kept, large.PairsOnDisk) and list(kept) == pairs
    assert isinstance(kept[4].prompt[0], Message)


def test_a_prompt_is_shown_as_it_was_said():
    assert spoken("Is it?") == spoken((USER,)) == "Is it?"
    assert spoken((*EARLIER, USER)) == "user: Hi\n\nassistant: Hello\n\nuser: Is it?"


# CSV.


def test_rows_of_a_csv_file_are_read(tmp_path):
    path = tmp_path / "pairs.csv"
    text = '\ufeffprompt,chosen,rejected\r\nIs it?,Yes.,No.\r\n"a, ""b""\nc","d\n",e\r\nq,x,y\r\n'
    path.write_bytes(text.encode())
    rows = dict(read_csv(path))
    assert list(rows) == [f"{path}, line {n}" for n in (2, 3, 6)]
    assert rows[f"{path}, line 3"] == {"prompt": 'a, "b"\nc', "chosen": "d\n", "rejected": "e"}
    assert load_pairs(path, str)[0] == PAIR == load_pairs(tmp_path, str)[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"prompt,chosen,rejected\na,b\n", "line 2: not the 3 fields"),
        (b"prompt,chosen,rejected\na,b,c\na,b,c,d\n", "line 3: not the 3 fields"),
        (b"prompt;chosen;rejected\na;b;c\n", "'prompt' is missing; fields are prompt;chosen"),
        (b"prompt,chosen,rejected\na,\xff,c\n", "not a CSV file in UTF-8"),
        (b'prompt,chosen,rejected\na,"b,c\n', "not a CSV file in UTF-8"),
    ],
)
def test_a_csv_file_that_cannot_be_read_is_one_line(tmp_path, content, message):
    (tmp_path / "pairs.csv").write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        load_pairs(tmp_path / "pairs.csv", str)
    assert "\n" not in str(caught.value)


def test_a_field_of_csv_may_be_long(tmp_path):
    (tmp_path / "pairs.csv").write_text(f"question,chosen,rejected\n{'a' * 200_000},b,c\n")
    assert len(load_pairs(tmp_path / "pairs.csv", str)[0].prompt) == 200_000
