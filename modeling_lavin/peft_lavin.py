"""Adapters of PEFT's own types on a LaVIN, with the projector trained beside them: MMA's rivals as configurations."""

import torch
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG
from peft.utils import ModulesToSaveWrapper

from .tuner_lavin import bring_in


PROJECTOR = "multi_modal_projector"
ADAPTER = "default"
# PEFT knows adaption prompts by the model's type, and fits them into the topmost attention modules, which are the
# decoder's. Theirs are computed as LLaMA's.
PROMPTED = ("llama", "mistral")
TRANSFORMERS_MODEL_CONFIG.setdefault("lavin", TRANSFORMERS_MODEL_CONFIG["llama"])


def with_adapter(model, peft: dict) -> PeftModel:
    """
    Puts an adapter of one of PEFT's own types on a frozen LaVIN. The projector is trained and saved with it, whole.

    What PEFT's `save_pretrained` then writes is an adapter folder of PEFT's own. `from_pretrained(base, peft=...)` and
    [`~peft.set_peft_model_state_dict`] read it again; PEFT's own loading would leave out an adaption prompt's
    projector.

    Args:
        model ([`LavinForConditionalGeneration`]): The model, changed in place.
        peft (`dict`): `peft_type` (`"LORA"`, `"IA3"`, `"ADAPTION_PROMPT"` ...), fields of that type's config,
            and `init_seed` (0 by default) for its random start.

    Raises:
        `ValueError`: if PEFT does not know the type or a field, or the decoder has no place for it.
    """
    if not isinstance(peft, dict) or str(peft.get("peft_type")) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        known = ", ".join(sorted(str(kind.value) for kind in PEFT_TYPE_TO_CONFIG_MAPPING))
        raise ValueError(f"`peft` must be a dict with `peft_type`, one of {known}; got {peft!r}.")
    fields = {key: value for key, value in peft.items() if key not in ("peft_type", "init_seed")}
    seed = peft.get("init_seed", 0)
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[peft["peft_type"]]
    if config_class.__name__ == "MMAConfig":
        raise ValueError("MMA is LaVIN's own adapter: pass its fields as `mma`.")
    if unknown := sorted(set(fields) - set(config_class.__dataclass_fields__)):
        raise ValueError(f"PEFT's {config_class.__name__} has no field {', '.join(unknown)}.")
    saves_modules = "modules_to_save" in config_class.__dataclass_fields__
    if saves_modules:
        fields["modules_to_save"] = sorted({*(fields.get("modules_to_save") or ()), PROJECTOR})
    config = config_class(**fields)
    if config.is_prompt_learning:
        raise ValueError(f"{config_class.__name__} puts tokens of its own before a row, which a LaVIN cannot take.")
    if config.is_adaption_prompt:
        text = model.config.text_config
        if text.model_type not in PROMPTED:
            raise ValueError(f"PEFT's adaption prompts fit a {' or a '.join(PROMPTED)}, not a {text.model_type}.")
        if not 1 <= (config.adapter_layers or 0) <= text.num_hidden_layers:  # beyond lie those of the vision tower
            raise ValueError(f"`adapter_layers` must be 1 to {text.num_hidden_layers}, got {config.adapter_layers}.")
    bring_in(model, [*(fields.get("modules_to_save") or ()), PROJECTOR])
    with torch.random.fork_rng(devices=[]):  # PEFT draws from the common generator: runs and ranks would differ
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config, adapter_name=ADAPTER)
    if away := next((name for name, p in adapted.named_parameters() if p.requires_grad and p.is_meta), None):
        raise ValueError(f"PEFT cannot train {away}, beside a weight that is offloaded: load without `device_map`.")
    if not saves_modules:
        wrapper = ModulesToSaveWrapper(model.model.multi_modal_projector, ADAPTER)
        wrapper.set_adapter(ADAPTER)
        model.model.multi_modal_projector = wrapper
    return adapted


__all__ = ["with_adapter"]
