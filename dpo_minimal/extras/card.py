"""Model cards: the README.md of each product, with the lines at its top that the hub reads.

A card says what the product is, from which base and data, with which settings, what was measured,
and how to load it. It names folders without the path to them.
"""

import json
import re
from pathlib import Path

from dpo_minimal.data import format_prompt
from dpo_minimal.extras.losses import describe_loss, loss_settings
from dpo_minimal.extras.plots import read_rows
from dpo_minimal.extras.reading import read_json
from dpo_minimal.extras.reuse import read_tables
from dpo_minimal.files import whole_file

QUESTION = "Why is the sky blue?"
TITLES = {
    "base": "a tiny Llama that has read the embedded forum",
    "sft": "{base}, fine-tuned on answers (SFT): an adapter",
    "dpo": "{base}, tuned on preferences (DPO): an adapter",
    "merged": "{base}, tuned on preferences (DPO): the whole model",
}
CAUTION = """It was trained over the base in 4 bits (NF4, double quantization), and belongs on that.
On the unquantized base it answers differently, because it has also learned to make up for the
rounding. The run's `merged/` is the 4-bit base, written out in bfloat16, with the adapter added:
take that where 4 bits are not at hand."""
NAMES = """The base's name above and `base_model_name_or_path` in `adapter_config.json` are those of
a folder. Before an upload set both to the base's name on the hub."""
LOAD_4_BITS = """four_bits = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.{dtype},
)
model = AutoModelForCausalLM.from_pretrained(
    "{base}", quantization_config=four_bits, dtype=torch.{dtype}
)
"""
BY_TEXT = """prompt = {prompt}
ids = [tokenizer.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]
"""
BY_TEMPLATE = """messages = [{{"role": "user", "content": "{question}"}}]
template = open("{here}/chat_template.jinja").read()
ids = tokenizer.apply_chat_template(
    messages, chat_template=template, add_generation_prompt=True, return_dict=False
)
"""
GENERATE = """answer = model.generate(
    input_ids=torch.tensor([ids], device=model.device), max_new_tokens=64, do_sample=False
)
print(tokenizer.decode(answer[0, len(ids) :], skip_special_tokens=True))
"""


def base_name(run) -> str:
    """The base's name: that on the hub, if its config.json knows it, else its folder's."""
    config = run.model_folder / "config.json"
    known = read_json(config).get("_name_or_path") if config.exists() else None
    if isinstance(known, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", known):
        return known
    return run.model_folder.resolve().name


def front_matter(run, product: str, base: str) -> str:
    """The lines for the hub. The forum's own base is nowhere, so it is not named."""
    adapter = product in ("sft", "dpo")
    lines = ["---"]
    if run.args.model and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
        lines.append(f"base_model: {base}")
    lines.append(f"library_name: {'peft' if adapter else 'transformers'}")
    lines += ["pipeline_tag: text-generation", "tags:", "- dpo_minimal", "- llama"]
    tags = {"sft": ["sft", "lora"], "dpo": ["dpo", "lora"], "merged": ["dpo"], "base": []}
    lines += [f"- {tag}" for tag in tags[product]]
    return "\n".join([*lines, "---"])


def training_pairs(out: Path) -> int | None:
    """How many pairs DPO was trained on, by the table of its reference; None if it is not clear."""
    tables = map(read_tables, out.glob("reference-*.pt"))
    sizes = {len(table["training"]) for table in tables if "training" in table}
    return sizes.pop() if len(sizes) == 1 else None


def steps_of(out: Path, stage: str) -> str:
    """What metrics.jsonl says of a stage's steps."""
    rows = [row for row in read_rows(out) if row["stage"] == stage and "loss" in row]
    if not rows:
        return "not trained in this run"
    rate, last = max(row["learning_rate"] for row in rows), rows[-1]
    told = f"{len(rows):,} steps, {last['epoch']:g} epochs, {last['num_tokens']:,} tokens"
    return f"{told}, learning rate up to {rate:.3g}"


def settings(run, product: str, base: str, held_out: dict) -> str:
    """A table of what a product was made from and how."""
    args, n = run.args, training_pairs(run.out)
    data = Path(args.data).resolve().name if args.data else "the embedded forum"
    rows = {
        "base": f"{base} (SHA-256 of its weights: {held_out['base_digest'][:16]})",
        "base in training": "as stored" if args.no_quantize else "4 bits: NF4, double quantization",
        "data": data if n is None else f"{data}: {n:,} training pairs",
    }
    if product != "base":
        rows["SFT"] = "left out" if args.no_sft else steps_of(run.out, "sft")
    if args.sft_adapter and product != "base":
        rows["SFT"] = f"the adapter {Path(args.sft_adapter).resolve().name}, of somebody else"
    if product in ("dpo", "merged"):
        rows["DPO"] = steps_of(run.out, "dpo")
        rows["loss"] = describe_loss(loss_settings(vars(args)))
    lora = f"rank {args.lora_r}, alpha {args.lora_alpha:g}, dropout {args.lora_dropout:g}"
    if product != "base":
        rows["LoRA"] = f"{lora}, on {args.target_modules.replace(',', ', ')}"
    rows["longest text"] = f"{args.max_length:,} tokens of prompt + answer"
    rows["seed"] = str(args.seed)
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {row} |" for name, row in rows.items())])


def results(product: str, held_out: dict, table: str) -> str:
    """What was measured on held-out pairs and questions."""
    asked = f"Answers to held-out questions, sampled at temperature 1:\n\n{table}"
    if product == "sft":
        return asked
    pairs = f"{held_out['of']:,} pairs of {Path(held_out['pairs']).name}"
    accuracy, margin = held_out["eval_rewards/accuracies"], held_out["eval_rewards/margins"]
    numbers = f"accuracy {accuracy:.3f}, margin {margin:+.3f}, loss {held_out['eval_loss']:.4f}"
    return f"DPO on {pairs}, against its reference: {numbers}.\n\n{asked}"


def loading(run, product: str, base: str) -> str:
    """Python for transformers (and PEFT), and the command of this project."""
    adapter, four_bits = product in ("sft", "dpo"), not run.args.no_quantize
    here, dtype = f"path/to/{product}", str(run.dtype).removeprefix("torch.")
    source = f"path/to/{base}" if adapter else here
    names = ["AutoModelForCausalLM", "AutoTokenizer"]
    code = f'model = AutoModelForCausalLM.from_pretrained("{source}", dtype="auto")\n'
    if adapter and four_bits:
        names.append("BitsAndBytesConfig")
        code = LOAD_4_BITS.format(dtype=dtype, base=source)
    head = f"import torch\nfrom transformers import {', '.join(names)}\n\n"
    if adapter:
        head = head.replace("torch\n", "torch\nfrom peft import PeftModel\n", 1)
        code += f'model = PeftModel.from_pretrained(model, "{here}")\n'
    code += f'tokenizer = AutoTokenizer.from_pretrained("{source}")\n'
    if run.template is not None:
        code += BY_TEMPLATE.format(question=QUESTION, here=here)
    else:
        code += BY_TEXT.format(prompt=json.dumps(format_prompt(QUESTION)))
    command = f"python -m dpo_minimal.generate --model {source}"
    if adapter:
        command += f" --adapter {here}" + ("" if four_bits else " --no-quantize")
    return f'```python\n{head}{code}{GENERATE}```\n\n```\n{command} --prompt "{QUESTION}"\n```'


def card_of(run, product: str, held_out: dict, table: str) -> str:
    """The whole card of a product: base, sft, dpo or merged."""
    base = base_name(run)
    parts = [front_matter(run, product, base), f"# {TITLES[product].format(base=base)}"]
    parts.append("Made with dpo_minimal: Direct Preference Optimization from scratch.")
    if product in ("sft", "dpo") and not run.args.no_quantize:
        parts.append(CAUTION)
    if product == "dpo" and not run.args.no_sft:
        parts.append("It holds both adapters, that of SFT and that of DPO, stacked into one.")
    parts += ["## How it was made", settings(run, product, base, held_out)]
    if product != "base":
        parts += ["## What was measured", results(product, held_out, table)]
    parts += ["## How to load it", loading(run, product, base)]
    if product in ("sft", "dpo"):
        parts.append(NAMES)
    return "\n\n".join(parts) + "\n"


def write_cards(run, held_out: dict, table: str) -> str:
    """Write the cards of the run's adapters and base; returns that of merged/, still to be written.

    With --reuse, base and SFT are another run's, and so are their cards. table: in Markdown.
    """
    products = ["dpo"] if run.args.reuse else ["base", "sft", "dpo"]
    for product in products:
        if (run.out / product).is_dir():
            with whole_file(run.out / product / "README.md") as file:
                file.write(card_of(run, product, held_out, table).encode())
    return card_of(run, "merged", held_out, table)
