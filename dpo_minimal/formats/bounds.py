"""What the numbers of a model's config may be: checked before anything is made of them."""

from dpo_minimal import InputError

SIZE, COUNT = (int, 1, 2**22), (int, 1, 2**14)
BOUNDS = {
    "vocab_size": SIZE,
    "hidden_size": SIZE,
    "intermediate_size": SIZE,
    "num_hidden_layers": (int, 1, 512),
    "num_attention_heads": COUNT,
    "num_key_value_heads": COUNT,
    "head_dim": COUNT,
    "max_position_embeddings": (int, 1, 2**30),
    "rms_norm_eps": (float, 0, 1),
    "rope_theta": (float, 1, 1e12),
    "tie_word_embeddings": (bool, False, True),
    "use_scaled_rope": (bool, False, True),  # Meta's
    "initializer_range": (float, 0, 1e3),
}
ROPE_BOUNDS = {
    "factor": (float, 1, 1e6),
    "low_freq_factor": (float, 1e-6, 1e6),
    "high_freq_factor": (float, 1e-6, 1e6),
    "original_max_position_embeddings": (int, 1, 2**30),
}
ADAPTER_BOUNDS = {"r": COUNT, "lora_alpha": (float, 0, 1e9)}
OPTIONAL = {"num_key_value_heads", "head_dim"}  # None: made of the others
KINDS = {int: "a whole number", float: "a number", bool: "true or false"}


def check_bounds(values: dict, bounds: dict = BOUNDS, owner="the config"):
    """InputError for a value that is of another type, not finite, or out of its bounds."""
    for key, (kind, low, high) in bounds.items():
        if key not in values or (values[key] is None and key in OPTIONAL):
            continue
        value = values[key]
        right = isinstance(value, bool) == (kind is bool)
        right = right and isinstance(value, (int, float) if kind is float else kind)
        if not right or not low <= value <= high:  # which NaN is not
            wanted = KINDS[kind] if kind is bool else f"{KINDS[kind]} from {low:g} to {high:g}"
            raise InputError(f"{owner}'s {key} is {str(value)[:60]!r}, which is not {wanted}")
