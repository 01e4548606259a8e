"""What several tests share: a tokenizer, a tiny model folder, real inputs where there are some."""

import pytest
import torch
from helpers import real_input

from dpo_minimal import forum
from dpo_minimal.extras import report
from dpo_minimal.formats.huggingface import save_llama
from dpo_minimal.llama import Llama, LlamaConfig
from dpo_minimal.tokenizer import Tokenizer, train_tokenizer

torch.set_num_threads(1)  # tensors are tiny here: more threads would only wait for one another

SHAPE = {
    "vocab_size": 420,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="session", autouse=True)
def few_tokens():
    """Untrained models never end an answer: let them say 8 tokens and not 128."""
    compare = report.compare

    def short(model, tokenizer, questions, **options):
        return compare(model, tokenizer, questions, **options | {"max_new_tokens": 8})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "compare", short)
        yield


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory):
    """A tokenizer.model of 420 pieces, learned from threads of the forum."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    texts = [row["text"] for row in forum.make_forum(0)["pretrain"][:300]]
    train_tokenizer(texts, SHAPE["vocab_size"], path)
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file):
    """The tokenizer of that file."""
    return Tokenizer(tokenizer_file)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer_file):
    """A folder with a small random Llama in float32 and that tokenizer. Copy it to change it."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    model = Llama(LlamaConfig(**SHAPE))
    save_llama(model, folder, torch.float32, tokenizer_from=tokenizer_file.parent)
    return folder


@pytest.fixture(scope="session")
def llama2_tokenizer():
    """The tokenizer of the published Llama 2."""
    return Tokenizer(real_input("llama2_tokenizer.model"))


@pytest.fixture(scope="session")
def real_preferences():
    """The path of 1,100 real preference pairs."""
    return real_input("instruction_preferences.json")
