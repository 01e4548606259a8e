"""The models that the benchmarks measure.

    python benchmarks/models.py random:llama-2-7b OUT

A model is a folder in the Hugging Face layout, or `random:SHAPE`: a checkpoint of that shape with
random weights, which is made once. Time and memory do not depend on the values of the weights. A
random model has no tokenizer, so it is measured on random token ids.
"""

import sys
from pathlib import Path

import torch
from record import script_parser

sys.path.insert(0, str(Path(__file__).parents[1]))  # dpo_minimal, installed or not

from dpo_minimal.files import whole_folder, write_json
from dpo_minimal.formats.huggingface import config_json, write_shards
from dpo_minimal.llama import Llama, LlamaConfig

SHAPES = {
    "tiny": {
        **{"vocab_size": 512, "hidden_size": 64, "intermediate_size": 192},
        **{"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
        "tie_word_embeddings": True,
    },
    "smollm2-135m": {
        **{"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536},
        **{"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3},
        **{"max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 100000.0},
        "tie_word_embeddings": True,
    },
    "tinyllama-1.1b": {
        **{"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632},
        **{"num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4},
        "rms_norm_eps": 1e-5,
    },
    "llama-2-7b": {
        **{"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008},
        **{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32},
        **{"max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    },
}


def model_folder(name: str, scratch=None) -> Path:
    """The folder of a model. A `random:SHAPE` is made in `scratch` if it is not there yet."""
    if not name.startswith("random:"):
        return Path(name)
    shape = name.removeprefix("random:")
    if shape not in SHAPES:
        raise SystemExit(f"random:{shape}: the shapes are {', '.join(SHAPES)}")
    scratch = Path(scratch or Path.home() / ".cache" / "dpo_minimal-benchmarks")
    folder = scratch / f"random-{shape}"
    if not folder.exists():
        scratch.mkdir(parents=True, exist_ok=True)
        print(f"making {folder}", file=sys.stderr, flush=True)
        write_random_model(LlamaConfig(**SHAPES[shape]), folder)
    return folder


def write_random_model(config: LlamaConfig, folder):
    """Write a Hugging Face folder of random bfloat16 weights: normal, std 0.02; norms are 1."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Llama(config).named_parameters()}
    # Seven billion samples would take minutes, so all tensors share these, each from another start.
    # Their number is prime, so that no two rows of a matrix are equal.
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(2**24 - 3, generator=generator).mul_(config.initializer_range)
    samples = samples.bfloat16()

    def read(name):
        shape = shapes[name]
        if "norm" in name:
            return torch.ones(shape, dtype=torch.bfloat16)
        start = list(shapes).index(name) * 654_321 % len(samples)
        copies = -(-shape.numel() // len(samples))
        return samples.roll(-start).repeat(copies)[: shape.numel()].view(shape)

    with whole_folder(folder) as partial:
        write_json(partial / "config.json", config_json(config, torch.bfloat16))
        write_shards(partial, shapes, torch.bfloat16, read)


def main():
    """The command line: make one random model."""
    parser = script_parser(__doc__)
    parser.add_argument("model", help="random: and one of " + ", ".join(SHAPES))
    parser.add_argument("out", help="the folder to make it in")
    args = parser.parse_args()
    print(model_folder(args.model, args.out))


if __name__ == "__main__":
    main()
