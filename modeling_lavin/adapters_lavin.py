"""Switching of adapters, by transformers' names: those of its own ask for a PEFT newer than the newest there is."""

from peft import PeftConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.functional import delete_adapter
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper

from .tuner_lavin import all_or_nothing


class LavinAdapterMixin:
    """
    transformers' [`~integrations.PeftAdapterMixin`], with `modules_to_save` switched as the layers are, no training of
    an adapter that was loaded for inference, and nothing left behind by the last one.
    """

    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        self._check_adapters()
        return next(layer.active_adapters for layer in self._adapted() if isinstance(layer, BaseTunerLayer))

    def add_adapter(self, adapter_config: PeftConfig, adapter_name: str | None = None):
        """Adds a new adapter, named "default" by default, and makes it the active one. No other type beside MMA."""
        adapter_name = adapter_name or "default"
        if not isinstance(adapter_config, PeftConfig):
            raise TypeError(f"`adapter_config` must be a PeftConfig, got {type(adapter_config).__name__}.")
        if adapter_name in getattr(self, "peft_config", {}):
            raise ValueError(f"Adapter with name {adapter_name} already exists. Please use a different name.")
        check_no_mma(self, adapter_config)
        adapter_config.base_model_name_or_path = self.name_or_path
        with all_or_nothing(self):
            inject_adapter_in_model(adapter_config, self, adapter_name)
            self._hf_peft_config_loaded = True
            self.set_adapter(adapter_name)

    def set_adapter(self, adapter_name: str | list[str]):
        """Makes an adapter the active one. One that was loaded for inference stays frozen."""
        self._check_adapters(adapter_name)
        with all_or_nothing(self):
            for module in self._adapted():
                module.set_adapter(adapter_name)
        self._freeze_inference_adapters()

    def enable_adapters(self):
        """Undoes [`disable_adapters`]."""
        self._check_adapters()
        for module in self._adapted():
            module.enable_adapters(True)
        self._freeze_inference_adapters()

    def disable_adapters(self):
        """From here on the model is its base."""
        self._check_adapters()
        for module in self._adapted():
            module.enable_adapters(False)

    def delete_adapter(self, adapter_names: str | list[str]):
        """Deletes adapters. After the last one the model is as it was before the first."""
        self._check_adapters(adapter_names)
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            prefix = PEFT_TYPE_TO_PREFIX_MAPPING[self.peft_config[name].peft_type]
            delete_adapter(self, adapter_name=name, prefix=prefix)
            del self.peft_config[name]
        if not self.peft_config:
            del self.peft_config
            self._hf_peft_config_loaded = False
            unwrap_adapters(self)

    def get_adapter_state_dict(self, adapter_name: str | None = None, state_dict: dict | None = None) -> dict:
        """The weights of an adapter, by default of the active one."""
        self._check_adapters(adapter_name or ())
        adapter_name = adapter_name or self.active_adapters()[0]
        return get_peft_model_state_dict(self, state_dict=state_dict, adapter_name=adapter_name)

    def _adapted(self) -> list:
        return [module for module in self.modules() if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper)]

    def _check_adapters(self, names: str | list[str] = ()):
        """
        Raises:
            `ValueError`: if there is no adapter, or none of that name.
        """
        if not self._hf_peft_config_loaded:
            raise ValueError("No adapter loaded. Please load an adapter first.")
        unknown = [name for name in ([names] if isinstance(names, str) else names) if name not in self.peft_config]
        if unknown:
            raise ValueError(f"No adapter is named {', '.join(unknown)}; there are {', '.join(self.peft_config)}.")

    def _freeze_inference_adapters(self):
        for adapter, config in self.peft_config.items():
            if config.inference_mode:
                for name, parameter in self.named_parameters():
                    if f".{adapter}." in name:
                        parameter.requires_grad_(False)


def unwrap_adapters(model):
    """Takes the wrappers of deleted adapters out of the model."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, ModulesToSaveWrapper):
                setattr(module, name, child.original_module)
            elif hasattr(child, "adapter_down"):
                setattr(module, name, child.base_layer)
        if "routing" in vars(module):
            module.routing.layers.clear()


def is_mma(adapter) -> bool:
    return adapter.peft_type.value == "MMA"


def check_no_mma(model, adapter):
    """
    Raises:
        `ValueError`: if an adapter of another type would come beside an MMA adapter: only one of them would act, and
            what is trained with MMA would go with neither.
    """
    names = [name for name, own in getattr(model, "peft_config", {}).items() if is_mma(own)]
    if names and hasattr(adapter, "peft_type") and getattr(adapter.peft_type, "value", adapter.peft_type) != "MMA":
        raise ValueError(
            f"This model has an MMA adapter ({', '.join(names)}), beside which no {adapter.__class__.__name__} can be "
            f"added: delete it first (`delete_adapter({names[0]!r})`), or load the base without it."
        )
