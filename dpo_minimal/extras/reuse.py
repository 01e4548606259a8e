"""DPO once more, on top of another run's SFT: its base, its adapter, its reference values.

The reference of DPO does not depend on beta, on the loss or on a learning rate. So to try others,
nothing but DPO must be computed again.
"""

import hashlib
import io
import json
import shutil
from pathlib import Path

import torch

from dpo_minimal import InputError
from dpo_minimal.extras import digest, parallel
from dpo_minimal.extras.losses import REFERENCE_FREE
from dpo_minimal.extras.reading import read_json, reading
from dpo_minimal.files import read_sealed, whole_file, whole_folder, write_sealed
from dpo_minimal.reference import new_table

# What base, SFT, the pairs and so the reference depend on.
FIXED = ("model", "data", "eval_data", "seed", "max_length", "dtype", "no_quantize", "no_sft")
FIXED += ("template", "template_digest")
FOLDERS = ("base", "data", "sft")


def begin(out: Path, source: Path, data: str):
    """Copy what a run starts from, if it is not there yet. data: the digest of this run's data."""
    missing = [name for name in FOLDERS if (source / name).exists() and not (out / name).exists()]
    if not missing and (out / "sft").exists():
        return
    if read_json(source / "config.json").get("data") != data:
        raise InputError(f"--reuse {source}: the data changed since that run")
    for tables in source.glob("reference-*"):  # first: folders tell what is done
        with whole_file(out / tables.name) as file:
            file.write(tables.read_bytes())
    for name in missing:
        with whole_folder(out / name) as folder:
            shutil.copytree(source / name, folder, dirs_exist_ok=True)


def tables_path(run) -> Path:
    """Where the reference's values are kept; the name says of which data, base (path) and SFT."""
    adapter = None if run.args.no_sft else run.out / "sft" / "adapter_model.safetensors"
    what = [getattr(run.args, name) for name in FIXED] + [str(run.dtype), run.device]
    what += [read_json(run.out / "config.json")["data"], digest.of_files(adapter)]
    name = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:12]
    return run.out / f"reference-{name}.pt"


def read_tables(path: Path) -> dict[str, torch.Tensor]:
    """{name: float32 [n, 2]} as `keep_tables` wrote them."""
    with reading(path, "reference values"):
        return torch.load(io.BytesIO(read_sealed(path)), weights_only=True)


def known_tables(run, sizes: dict[str, int]) -> dict[str, torch.Tensor]:
    """{name: float32 [n, 2]}: reference log-probabilities, NaN where nothing is known yet.

    Zeros for a loss that does not look at them: then they count as known, and none is computed.
    """
    if run.args.loss in REFERENCE_FREE:
        return {name: torch.zeros(n, 2) for name, n in sizes.items()}
    path, tables = tables_path(run), {name: new_table(n) for name, n in sizes.items()}
    if path.exists():
        for name, saved in read_tables(path).items():
            if name in tables and saved.shape == tables[name].shape:
                tables[name] = saved
    return tables


def keep_tables(run, tables: dict[str, torch.Tensor]):
    """Write the tables beside the products, for --reuse; those of process 0 are enough."""
    if parallel.first() and run.args.loss not in REFERENCE_FREE:
        data = io.BytesIO()
        torch.save(tables, data)
        write_sealed(tables_path(run), data.getvalue())
