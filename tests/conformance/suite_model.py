"""transformers' `ConfigTester`, `ModelTesterMixin` and `TrainingTesterMixin`, and our generation mixin."""

import unittest

from generation import GenerationTesterMixin
from sources import load
from testers import IMAGE_TOKEN, LavinTester, LlavaTester
from transformers.models.auto import modeling_auto


common = load("transformers", "test_modeling_common")
ConfigTester = load("transformers", "test_configuration_common").ConfigTester
TrainingTesterMixin = load("transformers", "test_training_mixin").TrainingTesterMixin

# The mixins look up here which classes take labels, and which have no loss.
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["lavin"] = "LavinForConditionalGeneration"
modeling_auto.MODEL_MAPPING_NAMES["lavin"] = "LavinModel"


def without_image_token(input_ids):
    return input_ids.masked_fill(input_ids == IMAGE_TOKEN, IMAGE_TOKEN + 1)


# Random ids of the mixins come without images. LLaVA takes an image token without an image for text; LaVIN raises.
random_ids = common.ids_tensor
common.ids_tensor = lambda *args, **kwargs: without_image_token(random_ids(*args, **kwargs))


class Configuration:
    def setUp(self):
        self.model_tester = self.model_tester_class(self)
        properties = ["image_token_id", "text_config", "vision_config"]
        self.tester = ConfigTester(
            self,
            config_class=self.model_tester_class.config_class,
            has_text_modality=False,
            common_properties=properties,
        )


for _name in [name for name in vars(ConfigTester) if name.startswith(("check_", "create_and_test_"))]:
    setattr(Configuration, f"test_{_name}", lambda self, name=_name: getattr(self.tester, name)())


class Model:
    _is_composite = True
    # The modality embedding acts through an adapter, and both models read the vision tower before its last norm.
    test_all_params_have_gradient = False
    test_can_init_all_missing_weights_before_2023 = True  # else only files with a recent copyright line are checked

    def setUp(self):
        self.model_tester = self.model_tester_class(self)
        self.all_model_classes = (self.model_tester_class.base_model_class, self.model_tester_class.causal_lm_class)

    def _prepare_for_class(self, inputs, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs, model_class, return_labels)
        if "pixel_values" not in inputs and "input_ids" in inputs:  # some checks pass on the main input only
            inputs["input_ids"] = without_image_token(inputs["input_ids"])
        return inputs


class Training:
    @property
    def model_tester(self):
        tester = self.model_tester_class(self)
        get_config = tester.get_config

        def with_vocabulary():  # the mixin reads it off the outer configuration
            config = get_config()
            config.vocab_size = tester.vocab_size
            return config

        tester.get_config = with_vocabulary
        return tester


class TestConfigurationLavin(Configuration, unittest.TestCase):
    model_tester_class = LavinTester


class TestConfigurationReference(Configuration, unittest.TestCase):
    model_tester_class = LlavaTester


class TestModelLavin(Model, common.ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    model_tester_class = LavinTester


class TestModelReference(Model, common.ModelTesterMixin, GenerationTesterMixin, unittest.TestCase):
    model_tester_class = LlavaTester


class TestTrainingLavin(Training, TrainingTesterMixin, unittest.TestCase):
    model_tester_class = LavinTester


class TestTrainingReference(Training, TrainingTesterMixin, unittest.TestCase):
    model_tester_class = LlavaTester
