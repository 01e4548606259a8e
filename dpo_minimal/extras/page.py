"""The page of the demo: what is asked, how it is sampled, and a card for each answer (gradio)."""

import os
from functools import partial
from html import escape

from dpo_minimal import InputError
from dpo_minimal.extras.answers import Answer, Sampling, Trio, ask, example_questions
from dpo_minimal.extras.sampling import answer_tokens

ROLES = {
    "base": "the model as it was",
    "SFT": "fine-tuned on answers",
    "DPO": "tuned on preferences",
}
STYLE = """
.gradio-container { max-width: 1120px !important; margin: 0 auto !important; }
.page { --base: #71717a; --SFT: #2563eb; --DPO: #059669; --minus: #dc2626; --muted: #5b5b66; }
.dark .page { --base: #a1a1aa; --SFT: #60a5fa; --DPO: #34d399; --minus: #f87171; --muted: #b4b4bd; }
.page .html-container { padding: 0; }
.page, .page * { box-sizing: border-box; }
.head h1 { font-size: 1.75rem; line-height: 1.2; margin: 1rem 0 .35rem; font-weight: 650; }
.head p, .note { color: var(--muted); margin: 0; line-height: 1.5; }
.note { font-size: .9rem; padding: .9rem .1rem .4rem; }
.note b { color: var(--body-text-color); }
.note .error { color: var(--minus); }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); }
.card { display: flex; flex-direction: column; min-width: 0; min-height: 17rem; overflow: hidden;
  background: var(--block-background-fill); border: 1px solid var(--border-color-primary);
  box-shadow: inset 0 4px 0 var(--tone); border-radius: 10px; padding: 1rem 1.1rem; }
.card header { display: flex; align-items: baseline; gap: .6rem; }
.card .count { margin-left: auto; text-align: right; }
.card h2 { color: var(--tone); font-size: 1.15rem; font-weight: 700; margin: 0; }
.card small { color: var(--muted); font-size: .82rem; }
.card .text { flex: 1; margin: .7rem 0 1rem; line-height: 1.55; white-space: pre-wrap;
  overflow-wrap: anywhere; color: var(--body-text-color); }
.card .text i { color: var(--muted); }
.writing::after { content: "\\258d"; color: var(--tone); animation: blink 1s steps(2) infinite; }
@keyframes blink { 50% { opacity: 0; } }
@media (prefers-reduced-motion: reduce) { .writing::after { animation: none; } }
.card footer { border-top: 1px solid var(--border-color-primary); padding-top: .7rem; }
.line { display: flex; justify-content: space-between; align-items: baseline; gap: .5rem; }
.line { font-variant-numeric: tabular-nums; min-height: 1.3rem; }
.line b { font-size: 1.45rem; font-weight: 650; color: var(--body-text-color); }
.bar { position: relative; height: 6px; margin: .4rem 0 .5rem; border-radius: 3px;
  background: var(--border-color-primary); }
.bar span { position: absolute; top: 0; bottom: 0; border-radius: 3px; }
.bar::after { content: ""; position: absolute; left: 50%; top: -3px; bottom: -3px; width: 2px;
  margin-left: -1px; background: var(--muted); }
.plus { background: var(--DPO); } .minus { background: var(--minus); }
"""
NO_CURSOR = """() => {
  document.querySelectorAll("#answers .writing").forEach(text => text.classList.remove("writing"));
}"""


def import_gradio():
    """The package gradio; InputError if it is not there. It sends nothing to its makers."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("GRADIO_RUN_HISTORY", "False")
    try:
        import gradio
    except ImportError:
        raise InputError("the demo needs gradio: pip install 'gradio>=6'") from None
    return gradio


def build(gradio, trio: Trio):
    """The page of a run, as gradio's Blocks."""
    with gradio.Blocks(title="Base, SFT, DPO", analytics_enabled=False) as blocks:
        gradio.HTML(head(trio), elem_classes="page")
        with gradio.Row(equal_height=True):
            question = gradio.Textbox(
                label="Question", lines=1, max_lines=6, scale=6, min_width=300, autofocus=True
            )
            with gradio.Column(scale=1, min_width=130):
                button = gradio.Button("Ask", variant="primary")
                stop = gradio.Button("Stop")
        questions = example_questions(trio.run)
        if questions:
            gradio.Examples(questions, question, label="Questions that no stage has trained on")
        shown = gradio.HTML(cards(trio, {}), elem_classes="page", elem_id="answers")
        settings = sampling_row(gradio, trio)
        answering = gradio.on(
            [button.click, question.submit],
            partial(show_answers, trio),
            [question, *settings],
            shown,
            show_progress="hidden",  # the cards show it themselves
            concurrency_limit=1,  # the adapters of the one model are switched
            api_name="ask",
        )
        stop.click(None, cancels=[answering]).then(None, js=NO_CURSOR)
    return blocks


def sampling_row(gradio, trio: Trio) -> list:
    """The sliders of `Sampling`, in its order."""
    usual = answer_tokens(trio.run)
    most = min(1024, trio.model.config.max_position_embeddings)
    with gradio.Row():
        return [
            gradio.Slider(0, 2, 0.7, step=0.05, label="Temperature"),
            gradio.Slider(0.05, 1, 0.95, step=0.05, label="Top-p"),
            gradio.Slider(1, most, min(usual, most), step=1, label="Max new tokens"),
            gradio.Number(0, label="Seed (empty: random)", precision=0, minimum=0, maximum=2**53),
        ]


def launch(gradio, blocks, host: str, port: int):
    """Serve the page; InputError if the address is not to be had."""
    sans, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]  # the reader's own
    theme = gradio.themes.Default(
        primary_hue="emerald", neutral_hue="zinc", font=sans, font_mono=mono
    )
    try:
        blocks.launch(
            server_name=host,
            server_port=port,
            theme=theme,
            css=STYLE,
            footer_links=[],
            ssr_mode=False,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
        )
    except OSError as error:
        reason = str(error).split(". ")[0]
        raise InputError(f"--host {host} --port {port}: {reason}; try another --port") from None


def show_answers(trio: Trio, question, temperature, top_p, length, seed):
    """Yield the cards as the answers grow; a problem is a line in place of the explanation."""
    sampling = Sampling(temperature, top_p, int(length), seed)
    yield cards(trio, {name: Answer() for name in trio.variants})
    try:
        for answers in ask(trio, question, sampling):
            yield cards(trio, answers)
    except InputError as error:
        yield cards(trio, {}, str(error))


# --- HTML -------------------------------------------------------------------------------------


def head(trio: Trio) -> str:
    """The title, and what is behind the answers."""
    run, config = trio.run, trio.model.config
    name = "the forum's tiny Llama" if run.on_forum else run.base.resolve().name
    bits = "in 4 bits (NF4)" if run.quantize else "not quantized"
    shape = f"{config.num_hidden_layers} layers of width {config.hidden_size}"
    text = f"{name}, {shape}, {bits}; DPO with beta = {run.beta:g}"
    title = f"One question, {'three' if run.sft else 'two'} answers"
    return f'<div class="head"><h1>{title}</h1><p>{escape(text)}</p></div>'


def cards(trio: Trio, answers: dict[str, Answer], problem: str = "") -> str:
    """A card for each answer, and below them what a reward is. Without answers: empty cards."""
    rewards = [abs(a.reward) for a in answers.values() if a.reward is not None]
    widest = max([1.0, *rewards])  # the bars of all cards have one scale
    beta, reference = trio.run.beta, "SFT" if trio.run.sft else "base"
    all_cards = [card(name, answers.get(name), beta, widest) for name in trio.variants]
    note = (
        f"<b>Reward</b>: how much likelier DPO makes this answer than its reference, {reference}, "
        f"does: beta × (log π − log π<sub>ref</sub>), with beta = {beta:g}. Above 0: likelier than "
        "before; below 0: less likely. Compare rewards of answers to one question only."
    )
    if trio.run.on_forum:
        note += " The <b>true score</b> is the forum judge's, from −6 to 4."
    if problem:
        note = f'<span class="error" role="alert">{escape(problem)}</span>'
    return f'<div class="cards">{"".join(all_cards)}</div><p class="note">{note}</p>'


def card(name: str, answer: Answer | None, beta: float, widest: float) -> str:
    """One answer: who gives it, its text, its reward."""
    answer, asked = answer or Answer(), answer is not None
    text = escape(answer.text)
    count = f"{answer.tokens} token{'s' * (answer.tokens > 1)}" if answer.tokens else ""
    if answer.reward is not None:
        count += ", cut off" * answer.cut
        body = f'<div class="text">{text or "<i>(nothing)</i>"}</div>'
        bottom = reward_lines(answer, beta, widest)
    else:
        body = f'<div class="text writing">{text}</div>' if asked else '<div class="text"></div>'
        bottom = line("Reward", "") + '<div class="bar"></div>' + line("&nbsp;", "")
    top = f"<h2>{name}</h2><small>{ROLES[name]}</small>"
    return (
        f'<article class="card" data-name="{name}" style="--tone: var(--{name})"><header>{top}'
        f'<small class="count">{count}</small></header>{body}<footer>{bottom}</footer></article>'
    )


def reward_lines(answer: Answer, beta: float, widest: float) -> str:
    """The reward as a number, as a bar from the middle, and as the sum that it comes from."""
    half = 50 * abs(answer.reward) / widest  # percent of the bar
    side = "plus" if answer.reward >= 0 else "minus"
    left = 50 if answer.reward >= 0 else 50 - half
    bar = f'<span class="{side}" style="left: {left:.1f}%; width: {half:.1f}%"></span>'
    logps = f"{beta:g} × ({signed(answer.log_pi)} − ({signed(answer.log_ref)}))"
    score = "" if answer.true_score is None else f"true score {signed(answer.true_score)}"
    number = f'<b class="reward">{signed(answer.reward)}</b>'
    return line("Reward", number) + f'<div class="bar">{bar}</div>' + line(logps, score)


def line(left: str, right: str) -> str:
    """A line with something at both ends."""
    return f'<div class="line"><small>{left}</small><small>{right}</small></div>'


def signed(value: float) -> str:
    """A number to two digits with its sign, a minus as it is printed; 0 has none."""
    text = f"{value:+.2f}".replace("-", "−")
    return text[1:] if float(f"{value:.2f}") == 0 else text
