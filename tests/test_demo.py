"""The demo: its answers are `generate`'s, its rewards are the definition's, its page is shown.

The page itself is tried in a real browser, where gradio, playwright and chromium are installed.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import fill_adapter

from dpo_minimal import InputError, forum
from dpo_minimal.checkpoint import load_adapter, load_llama, save_adapter
from dpo_minimal.data import format_prompt
from dpo_minimal.extras import answers, demo, page, report, space
from dpo_minimal.extras.answers import Answer, Sampling
from dpo_minimal.extras.command_line import run_command
from dpo_minimal.generate import generate
from dpo_minimal.lora import active_adapters, add_adapter

QUESTION = next(iter(forum.QUESTIONS))
ASKED = ["What is it?", "Is it\nso?", QUESTION]  # those of samples.md
BETA = 0.25
GREEDY = Sampling(temperature=0, top_p=1.0, max_new_tokens=9, seed=0)


def make_run(folder: Path, model_folder: Path, sft=True, ours=False) -> torch.nn.Module:
    """Write a run with random adapters; returns the model with its adapters one upon another."""
    model = load_llama(model_folder, quantize="nf4")
    for seed, name in enumerate(["sft", "dpo"] if sft else ["dpo"]):
        torch.manual_seed(seed)
        add_adapter(model, name, r=2, alpha=3, targets="all")
        fill_adapter(model, name, seed=seed)
    if sft:
        save_adapter(model, ["sft"], folder / "sft", str(model_folder))
    save_adapter(model, ["sft", "dpo"], folder / "dpo", str(model_folder))
    flags = {"stage": None, "beta": BETA, "no_sft": not sft, "no_quantize": False}
    flags |= {"model": None, "data": None} if ours else {"model": str(model_folder), "data": "x"}
    (folder / "config.json").write_text(json.dumps({"arguments": flags}))
    (folder / "samples.md").write_text(report.format_samples(ASKED, {"base": ["a", "b", "c"]}))
    if ours:
        shutil.copytree(model_folder, folder / "base")
    return model.eval()


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model_folder):
    """{name: (folder, model)}: a run on somebody's model, one without SFT, one on the forum."""
    root = tmp_path_factory.mktemp("runs")
    kinds = {"usual": {}, "no-sft": {"sft": False}, "forum": {"ours": True}}
    return {
        name: (root / name, make_run(root / name, model_folder, **how))
        for name, how in kinds.items()
    }


@pytest.fixture(scope="module")
def trios(runs):
    """{name: a run as the demo opens it}."""
    return {
        name: answers.open_run(answers.find_run(folder), "cpu", torch.float32)
        for name, (folder, _) in runs.items()
    }


def final(trio, question=QUESTION, sampling=GREEDY) -> dict[str, Answer]:
    """The answers at their end."""
    return list(answers.ask(trio, question, sampling))[-1]


def logp_by_hand(model, adapters, prompt, ids) -> float:
    """The sum of log softmax of each answer token, in float64, a forward pass per token."""
    total = 0.0
    for i, token in enumerate(ids):
        with active_adapters(model, adapters), torch.no_grad():
            logits = model(torch.tensor([prompt + ids[:i]]))[0, -1].double().numpy()
        total += logits[token] - logits.max() - np.log(np.exp(logits - logits.max()).sum())
    return total


@pytest.mark.parametrize(
    "sampling", [GREEDY, Sampling(temperature=1.3, top_p=0.9, max_new_tokens=7, seed=3)]
)
def test_each_answer_is_what_generate_gives_with_that_model_alone(
    runs, trios, model_folder, tokenizer, sampling
):
    shown = final(trios["usual"], sampling=sampling)
    expected = {}
    for name, adapter in {"base": None, "SFT": "sft", "DPO": "dpo"}.items():
        model = load_llama(model_folder, quantize="nf4")
        if adapter:
            load_adapter(model, runs["usual"][0] / adapter, "only")
        options = [sampling.max_new_tokens, sampling.temperature, sampling.top_p, sampling.seed]
        expected[name] = generate(model, tokenizer, QUESTION, *options)
    assert {name: answer.text for name, answer in shown.items()} == expected
    assert len(set(expected.values())) == 3


@pytest.mark.parametrize(("name", "reference"), [("usual", ["sft"]), ("no-sft", [])])
def test_the_reward_is_beta_times_log_pi_minus_log_ref_with_the_eos(
    runs, trios, tokenizer, name, reference
):
    trio, model = trios[name], runs[name][1]
    prompt = tokenizer.encode(format_prompt(QUESTION), bos=True)
    for end in ([], [tokenizer.eos_id]):
        ids = [300, 17, 255, *end]
        log_pi = logp_by_hand(model, [*reference, "dpo"], prompt, ids)
        log_ref = logp_by_hand(model, reference, prompt, ids)
        found = answers.rewarded(trio, QUESTION, prompt, ids)
        # float32 logits of size 10, and sums of four of them
        assert found.log_pi == pytest.approx(log_pi, abs=1e-4)
        assert found.log_ref == pytest.approx(log_ref, abs=1e-4)
        assert found.reward == pytest.approx(BETA * (log_pi - log_ref), abs=1e-4)
        assert abs(found.reward) > 0.01 and found.cut == (not end) and found.tokens == len(ids)
    assert list(trio.variants) == (["base", "SFT", "DPO"] if reference else ["base", "DPO"])


def test_answers_grow_side_by_side_and_rewards_come_at_the_end(trios):
    trio = trios["usual"]
    seen = list(answers.ask(trio, QUESTION, GREEDY))
    for step, now in enumerate(seen[:-1], start=1):
        assert {answer.tokens for answer in now.values()} == {step}
        assert all(answer.reward is None for answer in now.values())
    assert len(seen) == 10 and all(answer.reward is not None for answer in seen[-1].values())


def test_without_a_seed_each_time_is_another(trios):
    trio, sampling = trios["usual"], Sampling(2.0, 1.0, max_new_tokens=9, seed=None)
    assert final(trio, sampling=sampling)["DPO"].text != final(trio, sampling=sampling)["DPO"].text


def test_the_judge_scores_questions_of_the_forum_where_the_run_is_the_forums(trios):
    known = final(trios["forum"])
    for answer in known.values():
        assert answer.true_score == forum.judge(QUESTION, answer.text)
    assert final(trios["forum"], "Who are you?")["DPO"].true_score is None
    assert final(trios["usual"])["DPO"].true_score is None


def test_the_examples_are_the_questions_of_samples_md_else_the_forums_held_out_ones(runs, tmp_path):
    run = answers.find_run(runs["usual"][0])
    assert answers.example_questions(run) == ASKED
    folder = tmp_path / "forum"
    shutil.copytree(runs["forum"][0], folder)
    (folder / "samples.md").unlink()
    assert answers.example_questions(answers.find_run(folder)) == []
    forum.write_forum(folder / "data", seed=0)
    held_out = {row["question"] for row in forum.make_forum(0)["evaluation"]}
    found = answers.example_questions(answers.find_run(folder))
    assert len(found) == len(set(found)) == 6 and held_out.issuperset(found)


# --- what can go wrong ------------------------------------------------------------------------


def refused(capsys, monkeypatch, *flags) -> str:
    """The one line on stderr with which the command ends, with exit status 2."""
    monkeypatch.setattr(sys, "argv", ["demo", *map(str, flags)])
    with pytest.raises(SystemExit) as end:
        run_command(demo.main)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.count("\n") == 1, err
    return err


def test_without_gradio_it_says_so_before_a_model_is_loaded(runs, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(answers, "open_run", lambda *args: pytest.fail("a model was loaded"))
    said = refused(capsys, monkeypatch, runs["usual"][0])
    assert said == "error: the demo needs gradio: pip install 'gradio>=6'\n"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda run: shutil.rmtree(run), "there is no run with a config.json"),
        (lambda run: shutil.rmtree(run / "dpo"), "no dpo/ yet: run train.py --stage dpo first"),
        (lambda run: shutil.rmtree(run / "sft"), "no sft/ yet: run train.py --stage sft first"),
        (
            lambda run: shutil.rmtree(run / "base"),
            "base model is not there: say where with --model",
        ),
        (lambda run: (run / "config.json").write_text("{}"), "is not that of a run"),
        (
            lambda run: (run / "config.json").write_text(
                '{"arguments": {"stage": null, "beta": "1"}}'
            ),
            "beta is '1', which is no value of that flag",
        ),
    ],
)
def test_a_folder_that_is_no_finished_run_is_refused_in_one_line(
    runs, tmp_path, capsys, monkeypatch, change, said
):
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace())
    shutil.copytree(runs["forum"][0], tmp_path / "run")
    change(tmp_path / "run")
    line = refused(capsys, monkeypatch, tmp_path / "run")
    assert said in line and str(tmp_path / "run") in line


def test_a_question_that_is_none_or_too_long_is_told_on_the_page(trios):
    trio = trios["usual"]
    for question, said in ((" ", "there is no question yet"), ("a b " * 200, "tokens, this model")):
        *_, last = page.show_answers(trio, question, 0.7, 0.95, 8, 0)
        assert said in last and 'role="alert"' in last


# --- the page ---------------------------------------------------------------------------------


def test_it_listens_on_loopback_unless_told_otherwise(runs, monkeypatch):
    asked = {}
    monkeypatch.setattr(page, "import_gradio", lambda: SimpleNamespace())
    blocks = SimpleNamespace(local_url="here", block_thread=lambda: None)
    monkeypatch.setattr(page, "build", lambda gradio, trio: blocks)
    monkeypatch.setattr(page, "launch", lambda *args: asked.update(last=args[2:]))
    for flags, expected in (
        ([], ("127.0.0.1", 7860)),
        (["--host", "0.0.0.0", "--port", "81"], ("0.0.0.0", 81)),
    ):
        monkeypatch.setattr(sys, "argv", ["demo", str(runs["usual"][0]), *flags])
        demo.main()
        assert asked["last"] == expected


def test_a_port_that_is_taken_is_one_line_and_nothing_is_shared(monkeypatch):
    given = {}

    def launch(**options):
        given.update(options)
        raise OSError("Cannot find empty port in range: 81-81. You can specify a different port.")

    gradio = SimpleNamespace(themes=SimpleNamespace(Default=dict))
    with pytest.raises(InputError) as refusal:
        page.launch(gradio, SimpleNamespace(launch=launch), "127.0.0.1", 81)
    assert str(refusal.value) == (
        "--host 127.0.0.1 --port 81: Cannot find empty port in range: 81-81; try another --port"
    )
    assert (given["server_name"], given["server_port"], given["share"]) == ("127.0.0.1", 81, False)


def test_a_page_shows_texts_as_they_are_and_the_sum_of_each_reward(trios):
    trio = trios["usual"]
    done = Answer("<b>1 & 2</b>", 12, cut=True, log_pi=-3.5, log_ref=-1.5, reward=-0.5)
    shown = page.cards(trio, {"base": done, "SFT": Answer("so", 1), "DPO": Answer()})
    assert "&lt;b&gt;1 &amp; 2&lt;/b&gt;" in shown and "<b>1" not in shown
    assert "−0.50" in shown and "0.25 × (−3.50 − (−1.50))" in shown and "12 tokens, cut" in shown
    assert ">1 token<" in shown
    assert "left: 25.0%; width: 25.0%" in shown  # half of the way to -1, where the bar ends
    assert shown.count('class="card"') == 3 and shown.count('class="text writing"') == 2
    assert shown.count('class="reward"') == 1


# --- a Space ----------------------------------------------------------------------------------


def files_of(folder: Path) -> set[str]:
    """The files below a folder, but for the package's."""
    files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return {str(path) for path in files if path.parts[0] != "dpo_minimal"}


ADAPTER = ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("name", ["usual", "no-sft", "forum"])
def test_a_space_has_all_that_it_needs_and_nothing_of_this_machine(
    runs, tmp_path, model_folder, name
):
    said = space.write_space(answers.find_run(runs[name][0]), tmp_path / "space")
    folder = tmp_path / "space"
    expected = {"app.py", "README.md", "requirements.txt", "run/config.json", "run/samples.md"}
    parts = ["dpo"] if name == "no-sft" else ["sft", "dpo"]
    expected |= {f"run/{part}/{file}" for part in parts for file in ADAPTER}
    if name == "forum":
        expected |= {f"run/base/{path.name}" for path in model_folder.iterdir()}
    assert files_of(folder) == expected
    package = Path(answers.__file__).parents[1]
    sources = {path.relative_to(package) for path in package.rglob("*.py")}
    assert {p.relative_to(folder / "dpo_minimal") for p in folder.rglob("dpo_minimal/**/*.py")} == (
        sources
    )
    assert (folder / "dpo_minimal" / "forum.json").exists()
    for path in folder.rglob("*"):
        if path.is_file():
            assert str(model_folder).encode() not in path.read_bytes(), path
    app = (folder / "app.py").read_text("utf-8")
    if name == "forum":
        assert 'MODEL = HERE / "run" / "base"' in app and "MODEL" not in said
    else:
        line = next(line for line in app.splitlines() if line.startswith("MODEL"))
        assert line == 'MODEL = ""' and "fill in MODEL" in said
        assert "'tiny'" in app  # the name of the model that the adapters belong to
    front = (folder / "README.md").read_text("utf-8").split("---\n")[1]
    settings = dict(line.split(": ", 1) for line in front.splitlines())
    assert (settings["sdk"], settings["app_file"]) == ("gradio", "app.py")
    assert json.loads(settings["title"]) == "DPO on " + (
        "a small forum" if name == "forum" else "tiny"
    )
    assert settings["sdk_version"].split(".")[0] == "6"
    wanted = (folder / "requirements.txt").read_text().split()
    assert {"torch>=2.6", "sentencepiece>=0.2", "gradio>=6"} <= set(wanted)


def test_a_space_is_written_whole_or_not_at_all_and_over_nothing(runs, tmp_path, monkeypatch):
    run = answers.find_run(runs["forum"][0])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="it is there already: give a new folder"):
        space.write_space(run, tmp_path / "full")
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(space, "copy_run", full_disk)
    with pytest.raises(OSError, match="No space left"):
        space.write_space(run, tmp_path / "space")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_model_that_was_not_filled_in_is_one_line(model_folder):
    with pytest.raises(InputError, match="MODEL is empty: fill in"):
        space.base_folder("")
    assert space.base_folder(model_folder) == model_folder


@pytest.fixture(scope="module")
def written(runs, tmp_path_factory):
    """The forum run as a Space."""
    folder = tmp_path_factory.mktemp("spaces") / "space"
    space.write_space(answers.find_run(runs["forum"][0]), folder)
    return folder


def test_a_spaces_app_runs_from_elsewhere_with_its_own_source(written, tmp_path):
    (tmp_path / "gradio.py").write_text("raise ImportError('not here')")  # even if it is installed
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(written / "app.py")]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: the demo needs gradio: pip install 'gradio>=6'\n"


# --- in a browser -----------------------------------------------------------------------------


@pytest.fixture
def address(written, tmp_path):
    """The address of the Space's page, served by `python app.py` from elsewhere."""
    pytest.importorskip("gradio")
    pytest.importorskip("playwright")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"GRADIO_SERVER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    environment |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(written / "app.py")]
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
    try:
        for _ in range(600):
            assert server.poll() is None, (tmp_path / "log").read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture
def browser():
    """A headless chromium."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield found
        found.close()


def test_in_a_browser_three_answers_appear_with_their_rewards(trios, browser, address):
    view, requests = browser.new_page(viewport={"width": 1280, "height": 860}), []
    view.on("request", lambda request: requests.append(request.url))
    view.goto(address)
    view.get_by_label("Question", exact=True).fill(QUESTION)
    view.get_by_role("spinbutton", name="Temperature").fill("0")
    view.get_by_role("spinbutton", name="Max new tokens").fill("9")
    view.get_by_role("button", name="Ask", exact=True).click()
    view.locator(".reward").nth(2).wait_for(timeout=60_000)
    expected = final(trios["forum"])
    for name, answer in expected.items():
        card = view.locator(f'.card[data-name="{name}"]')
        assert card.locator(".text").inner_text().split() == answer.text.split()
        assert card.locator(".reward").inner_text() == page.signed(answer.reward)
        assert f"true score {page.signed(answer.true_score)}" in card.inner_text()
    assert len({answer.text for answer in expected.values()}) == 3
    widths = [box.bounding_box()["width"] for box in view.locator(".card").all()]
    assert len(widths) == 3 and max(widths) - min(widths) < 1
    view.set_viewport_size({"width": 360, "height": 700})
    assert view.evaluate("document.documentElement.scrollWidth") == 360
    elsewhere = [url for url in requests if not url.startswith((address, "data:", "blob:"))]
    assert requests and elsewhere == []
