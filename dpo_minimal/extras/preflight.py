"""What to check and to tell before a run trains anything."""

from dpo_minimal import InputError
from dpo_minimal.llama import LlamaConfig


def check_fit(folder, tokenizer, config: LlamaConfig, max_length: int, log=print):
    """InputError if the tokenizer has ids that the model lacks; a warning about long texts."""
    ids = {"BOS": tokenizer.bos_id, "EOS": tokenizer.eos_id, "last id": tokenizer.vocab_size - 1}
    for name, number in ids.items():
        if not 0 <= number < config.vocab_size:
            size = f"the model's vocabulary has {config.vocab_size} entries"
            raise InputError(f"{folder}: the tokenizer's {name} is {number}, but {size}")
    if max_length > config.max_position_embeddings:
        context = f"the model's context of {config.max_position_embeddings} tokens"
        log(f"warning   --max-length {max_length} is longer than {context}")
