"""Digests that tell whether two are equal: data files, pairs, the weights of a base."""

import hashlib
import json
from pathlib import Path

import torch

from dpo_minimal import InputError
from dpo_minimal.extras import progress
from dpo_minimal.extras.skeleton import skeleton
from dpo_minimal.formats.huggingface import open_weights, read_config
from dpo_minimal.formats.rows import data_files


def of_files(*places) -> str:
    """A hash of the names and contents of files, or of all files below folders."""
    digest = hashlib.sha256()
    for place in places:
        files = []
        if place is not None:
            path = Path(place)
            found = path.rglob("*") if path.is_dir() else data_files(path)
            files = sorted(file for file in found if file.is_file())
        for file in files:
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with open(file, "rb") as opened:
                while block := opened.read(2**20):
                    digest.update(block)
    return digest.hexdigest()


def of_pairs(pairs) -> str:
    """A hash of pairs in their order: of PreferencePairs as text, of EncodedPairs as token ids."""
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(json.dumps(pair).encode())
    return digest.hexdigest()


def of_base(folder) -> str:
    """A hash of a model folder's weights, in whichever files and in whichever layout they are.

    It reads them all: seconds for a small model, half a minute for 7B.
    """
    folder = Path(folder)
    config, digest = read_config(folder), hashlib.sha256()
    weights = open_weights(folder)
    names = {name for name, _ in skeleton(config).named_parameters()}
    if config.tie_word_embeddings:
        names -= {"lm_head.weight"}  # some files have a copy of it, others do not
    for done, name in enumerate(sorted(names)):
        progress.show(f"digest of {folder.name}", done, len(names), "tensors")
        if name not in weights:
            raise InputError(f"{folder}: its weights lack {name}")
        tensor = weights[name].read()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
