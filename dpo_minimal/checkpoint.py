"""Loading and saving models and adapters: the four functions, whose formats are in `formats/`."""

from dpo_minimal.formats.huggingface import load_llama, save_llama
from dpo_minimal.formats.peft import load_adapter, save_adapter

__all__ = ["load_adapter", "load_llama", "save_adapter", "save_llama"]
