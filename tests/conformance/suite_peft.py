"""PEFT's `PeftCommonTester`: every check of it on MMA and on LoRA."""

import inspect
import tempfile

import pytest
import torch
from peft import LoraConfig
from sources import load
from testers import LavinTester, LlavaTester

from lavin import MMAConfig


common = load("peft", "testing_common")

# Checks that take more than a model, a config class and its fields: every value they are called with.
EXTRA = {
    "_test_add_adapter_no_autocast_adapter_dtype": [{"dtype": torch.float16}, {"dtype": torch.bfloat16}],
    "_test_generate_pos_args": [{"raises_err": False}],
    "_test_save_pretrained": [{"safe_serialization": True}, {"safe_serialization": False}],
    "_test_save_pretrained_selected_adapters": [{"safe_serialization": True}, {"safe_serialization": False}],
    "_test_training_gradient_checkpointing": [{"use_reentrant": True}, {"use_reentrant": False}],
    "_test_passing_input_embeds_works": [{"test_name": ""}],
}
ARGUMENTS = ["self", "model_id", "config_cls", "config_kwargs"]
CHECKS = [
    (name, extra)
    for name, check in vars(common.PeftCommonTester).items()
    if name.startswith("_test_")
    for extra in EXTRA.get(name, [{}])
    if set(inspect.signature(check).parameters) <= {*ARGUMENTS, *extra}
]
# They pass on the ids, or their embeddings, alone. LLaVA takes image tokens without images for text; LaVIN raises.
WITHOUT_IMAGES = ("_test_generate_pos_args", "_test_passing_input_embeds_works")


def label(value):
    return value.removeprefix("_") if isinstance(value, str) else "-".join(map(str, value.values()))


class Adapter(common.PeftCommonTester):
    def prepare_inputs_for_testing(self):
        torch.manual_seed(0)
        config, inputs = self.model_tester_class().prepare_config_and_inputs_for_common()
        if self.check in WITHOUT_IMAGES:
            del inputs["pixel_values"]
            inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == config.image_token_id, 5)
        return inputs

    @pytest.fixture(scope="class")
    def model_id(self, request):
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patched:
            patched.chdir(folder)  # so that its name looks like one of the Hub's: adapters name no other folder
            torch.manual_seed(0)
            tester = request.cls.model_tester_class()
            tester.causal_lm_class(tester.get_config()).save_pretrained("org/tiny")
            yield "org/tiny"

    @pytest.mark.parametrize("check, extra", CHECKS, ids=label)
    def test(self, model_id, check, extra):
        type(self).transformers_class = self.model_tester_class.causal_lm_class
        self.check = check
        getattr(self, check)(
            model_id=model_id, config_cls=self.config_class, config_kwargs=dict(self.config_kwargs), **extra
        )


class TestPeftLavin(Adapter):
    model_tester_class, config_class = LavinTester, MMAConfig
    config_kwargs = {"task_type": "CAUSAL_LM", "init_weights": False}


class TestPeftReference(Adapter):
    model_tester_class, config_class = LlavaTester, LoraConfig
    config_kwargs = {
        "task_type": "CAUSAL_LM",
        "r": 8,
        "lora_alpha": 32,
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": r".*vision_tower.*",  # PEFT's adapters in one batch count rows, not images
        "lora_dropout": 0.05,
        "init_lora_weights": False,
    }


del Adapter
