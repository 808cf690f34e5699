"""
transformers' generation tests by their own names, on LaVINs with an adapter that matters: the checks are those that
`make conformance` runs on LaVIN and LLaVA (tests/conformance/generation.py). tests/test_generation.py has the rest:
every cache, chunks, turns, rows of different length, and that a row's modality follows it everywhere.
"""

import unittest

import torch
from conformance.generation import GenerationTesterMixin
from conftest import pad, pixels, row, tiny_lavin


class LavinGenerationTest(GenerationTesterMixin, unittest.TestCase):
    def generative_models(self):
        """Two ways to lay out heads; three rows of one length, with an image each."""
        for text in ("llama2", "qwen3"):
            torch.manual_seed(0)
            model = tiny_lavin(text)
            yield model, {**pad([row(model.config, seed=seed) for seed in range(3)]), "pixel_values": pixels(3)}

    def test_all_rows_are_of_their_image(self):
        """The inputs above would show nothing if the pictures did not matter."""
        for model, inputs in self.generative_models():
            other = {**inputs, "pixel_values": pixels(3, seed=9)}
            scores = [
                self.generate(model, given, return_dict_in_generate=True, output_scores=True).scores[0]
                for given in (inputs, other)
            ]
            self.assertTrue(((scores[0] - scores[1]).abs().amax(dim=1) > 1e-2).all())
