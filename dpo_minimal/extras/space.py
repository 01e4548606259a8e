"""A folder that is a Hugging Face Space: the demo's page, this package's source, a run."""

import json
import shutil
from pathlib import Path

from dpo_minimal import InputError
from dpo_minimal.extras.answers import FinishedRun
from dpo_minimal.extras.reading import first_line, read_json
from dpo_minimal.files import whole_folder, write_json

GRADIO = "6.31.0"  # the release that the page was tested with
PACKAGE = Path(__file__).parents[1]
NEEDED = ("beta", "no_sft", "no_quantize")  # of a run's flags, in a Space
APP = '''"""Base, SFT and DPO answer a question side by side: run this file."""

import os
from pathlib import Path

from dpo_minimal.extras.command_line import run_command
from dpo_minimal.extras.demo import serve
from dpo_minimal.extras.space import base_folder

HERE = Path(__file__).parent
{model}


def main():
    """Load the run and show its page, on loopback unless the Space says where."""
    host = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")
    port = int(os.environ.get("GRADIO_SERVER_PORT", "7860"))
    serve(HERE / "run", base_folder(MODEL), host=host, port=port)


if __name__ == "__main__":
    run_command(main)
'''
OURS = 'MODEL = HERE / "run" / "base"'
HUB = '''# Fill in the base model's name on the Hub, like "meta-llama/Llama-2-7b-hf", or a folder.
# The adapters were trained over {name!r} and fit no other.
MODEL = ""'''
README = """---
title: {title}
emoji: ⚖️
colorFrom: gray
colorTo: green
sdk: gradio
sdk_version: {gradio}
app_file: app.py
pinned: false
---

A question, and the answers of a model before tuning, after supervised fine-tuning and after Direct
Preference Optimization, each with DPO's implicit reward. Made with dpo_minimal.

- Here: `pip install -r requirements.txt`, then `python app.py`.
- As a Space: `hf upload --repo-type space YOUR_NAME/YOUR_SPACE .`
{notes}"""


def write_space(run: FinishedRun, folder) -> str:
    """Write the Space of a run into a new folder, whole or not at all; returns what to do next.

    The base is part of it if it was made here, from the forum. Paths of this machine are left out.
    """
    folder, name = Path(folder), run.base.resolve().name
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--space {folder}: it is there already: give a new folder")
    ours = run.base.resolve() == (run.folder / "base").resolve()
    title = f"DPO on {'a small forum' if run.on_forum else name}"
    model, notes = OURS, ""
    if not ours:
        model = HUB.format(name=name)
        notes = f"- First fill in `MODEL` in app.py: the Hub's name of the base model ({name}).\n"
    with whole_folder(folder) as partial:
        (partial / "app.py").write_text(APP.format(model=model), "utf-8")
        readme = README.format(title=json.dumps(title), gradio=GRADIO, notes=notes)
        (partial / "README.md").write_text(readme, "utf-8")
        (partial / "requirements.txt").write_text("\n".join(requirements(run)) + "\n", "utf-8")
        left_out = shutil.ignore_patterns("__pycache__", "main")
        shutil.copytree(PACKAGE, partial / "dpo_minimal", ignore=left_out)
        copy_run(run, partial / "run", ours)
    last = "python app.py" if ours else f"fill in MODEL in {folder / 'app.py'}, then python app.py"
    return f"{folder} is a Space: {last} tries it here, its README.md says how to upload it"


def requirements(run: FinishedRun) -> list[str]:
    """What pip must install there."""
    packages = ["torch>=2.6", "sentencepiece>=0.2", "numpy>=1.26", "gradio>=6"]
    return packages + ["tokenizers"] * (not (run.base / "tokenizer.model").exists())


def copy_run(run: FinishedRun, folder: Path, with_base: bool):
    """Copy of a run what answering needs; config files name no folder of this machine."""
    folder.mkdir()
    flags = {name: run.flags.get(name) for name in NEEDED}
    flags |= {"stage": None, "model": None, "data": None if run.on_forum else "not here"}
    write_json(folder / "config.json", {"arguments": flags})
    for name in (["sft"] if run.sft else []) + ["dpo"]:
        shutil.copytree(run.folder / name, folder / name)
        path = folder / name / "adapter_config.json"
        base = {"base_model_name_or_path": run.base.resolve().name}
        write_json(path, read_json(path) | base)
    if (run.folder / "samples.md").exists():
        shutil.copy(run.folder / "samples.md", folder)
    if with_base:
        shutil.copytree(run.base, folder / "base")


def base_folder(model) -> Path:
    """The base model's folder: `model` itself, or what the Hub has under this name."""
    if not str(model):
        raise InputError("app.py: MODEL is empty: fill in the base model's name on the Hub")
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download  # gradio brings it

    wanted = ["*.safetensors", "*.json", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(str(model), allow_patterns=wanted))
    except Exception as error:  # no such name, no permission, no network: each has its own class
        reason = first_line(error)
        raise InputError(f"app.py: MODEL = {model!r} is not to be had: {reason}") from None
