"""transformers' `ProcessorTesterMixin` on `LavinProcessor` and on `LlavaProcessor`."""

import unittest

from sources import load
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from lavin import LavinProcessor
from lavin.processing_lavin import DEFAULT_CHAT_TEMPLATE


ProcessorTesterMixin = load("transformers", "test_processing_common").ProcessorTesterMixin

SIZE, PATCH = 28, 14
LLAVA_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{% if not loop.last or not continue_final_message %}{{ ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def tiny_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["lower newer upper older longer string"] * 9, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        extra_special_tokens=["<image>"],
        model_input_names=["input_ids", "attention_mask"],
    )


class Processor(ProcessorTesterMixin):
    @classmethod
    def _setup_tokenizer(cls):
        return tiny_tokenizer()


class TestProcessorLavin(Processor, unittest.TestCase):
    processor_class = LavinProcessor

    @classmethod
    def _setup_image_processor(cls):
        return CLIPImageProcessorPil(size={"height": SIZE, "width": SIZE}, do_center_crop=False)

    @staticmethod
    def prepare_processor_dict():
        return {"chat_template": DEFAULT_CHAT_TEMPLATE, "num_image_tokens": 2, "image_token": "<image>"}


class TestProcessorReference(Processor, unittest.TestCase):
    processor_class = LlavaProcessor

    @classmethod
    def _setup_image_processor(cls):
        return CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})

    @staticmethod
    def prepare_processor_dict():
        return {
            "chat_template": LLAVA_TEMPLATE,
            "patch_size": PATCH,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        }


del Processor, ProcessorTesterMixin
