"""
Why a common check does not apply to LaVIN, where it applies to what runs beside it.

Patterns of `fnmatch` over `suite::test`. An entry that no longer fails or skips is reported: it has to go.
"""

ONE_MERGE = (
    "MMA weighs its experts by the modality of a row, so one merge cannot serve both: it raises, and names "
    "`merge_modality('text' | 'image')` and `fold()`, which tests/test_folding.py checks."
)
LORA_ONLY = "PEFT has it for LoRA and few others; MMA refuses it and says what to do instead."
TRAINS_MORE = (
    "The check expects gradients in nothing but the adapter's own weights; MMA trains the projector and the modality "
    "embedding as well. LoRA fails it likewise with `modules_to_save`. tests/test_modeling.py compares the gradients."
)

NUMBER_NEEDED = (
    "The check builds a processor of its parts alone. LavinProcessor wants `num_image_tokens` there and then: a "
    "number that does not fit the model would show only in training."
)

REASONS = {
    "model::test_reverse_loading_mapping": "LaVIN has no older layout, as LLaVA has, to rename weights from.",
    "processor::test_tokenizer_decode_defaults": NUMBER_NEEDED,
    "peft::test_merge_layers*": ONE_MERGE,
    "peft::test_safe_merge*": ONE_MERGE,
    "peft::test_mixed_adapter_batches*": LORA_ONLY,
    "peft::test_generate_with_mixed_adapter_batches*": LORA_ONLY,
    "peft::test_weighted_combination_of_adapters*": LORA_ONLY,
    "peft::test_training_layer_indexing*": "No `layers_to_transform`: a `target_modules` regex says it.",
    "peft::test_adding_multiple_adapters_with_bias_raises*": "No `bias`: MMA trains no bias of the base.",
    "peft::test_training_gradient_checkpointing*": TRAINS_MORE,
}
