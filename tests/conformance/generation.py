"""
Generation under the names of transformers' own `GenerationTesterMixin`, which its source distribution leaves out.

Not here: quantised caches (another library), compiled generation (`tests/test_modeling.py` compiles LaVIN with both
caches), and what only encoder-decoders have.
"""

import torch
from transformers import DynamicCache, GenerationMixin, StaticCache
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput


NEW_TOKENS = 4


class GenerationTesterMixin:
    """
    Checks of `generate`. A test class has `all_generative_model_classes` and a `model_tester`, as for
    `ModelTesterMixin`, or its own `generative_models`.
    """

    def generative_models(self):
        """Each model in eval mode that never ends an answer by itself, with inputs whose rows hold an image each."""
        for model_class in self.all_generative_model_classes:
            torch.manual_seed(0)
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            model = model_class(config).eval()
            model.generation_config.eos_token_id = None
            model.generation_config.pad_token_id = config.get_text_config().pad_token_id
            yield model, inputs

    def text_only(self, model, inputs):
        """The same rows without images: no model finds an image token's place in embeddings alone."""
        image_token_id = model.config.image_token_id
        input_ids = inputs["input_ids"].masked_fill(inputs["input_ids"] == image_token_id, 5)
        return {"input_ids": input_ids, "attention_mask": inputs["attention_mask"]}

    def generate(self, model, inputs, **kwargs):
        torch.manual_seed(0)
        kwargs = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, **kwargs}
        return model.generate(**inputs, **kwargs)

    def check_sequences(self, output, inputs, rows_each=1):
        rows, length = inputs["input_ids"].shape
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        self.assertEqual(sequences.shape, (rows * rows_each, length + NEW_TOKENS))
        self.assertTrue(torch.equal(sequences[:, :length], inputs["input_ids"].repeat_interleave(rows_each, 0)))

    def check_equal(self, a, b):
        self.assertTrue(torch.equal(a, b), f"{a.tolist()} is not {b.tolist()}")

    def test_inherits_generation_mixin(self):
        for model, _ in self.generative_models():
            self.assertIsInstance(model, GenerationMixin)
            self.assertTrue(model.can_generate())

    def test_greedy_generate(self):
        for model, inputs in self.generative_models():
            output = self.generate(model, inputs)
            self.check_sequences(output, inputs)
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            for _ in range(NEW_TOKENS):  # the whole sequence again for every token
                with torch.no_grad():
                    logits = model(**{**inputs, "input_ids": ids, "attention_mask": mask}, use_cache=False).logits
                ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            self.check_equal(output, ids)

    def test_greedy_generate_dict_outputs(self):
        for model, inputs in self.generative_models():
            model.set_attn_implementation("eager")
            wanted = {f"output_{name}": True for name in ("scores", "logits", "hidden_states", "attentions")}
            output = self.generate(model, inputs, return_dict_in_generate=True, use_cache=False, **wanted)
            self.assertIsInstance(output, GenerateDecoderOnlyOutput)
            self.check_sequences(output, inputs)
            config = model.config.get_text_config()
            for name in ("scores", "logits", "hidden_states", "attentions"):
                self.assertEqual(len(output[name]), NEW_TOKENS)
            for score in output.scores:
                self.assertEqual(score.shape, (len(inputs["input_ids"]), config.vocab_size))
            for step, (states, attentions) in enumerate(zip(output.hidden_states, output.attentions, strict=True)):
                length = inputs["input_ids"].shape[1] + step
                self.assertEqual(len(states), config.num_hidden_layers + 1)
                self.assertEqual(states[-1].shape[1], length)
                self.assertEqual(len(attentions), config.num_hidden_layers)
                self.assertEqual(attentions[0].shape[-2:], (length, length))

    def test_greedy_generate_dict_outputs_use_cache(self):
        for model, inputs in self.generative_models():
            kwargs = {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True}
            cached = self.generate(model, inputs, use_cache=True, **kwargs)
            plain = self.generate(model, inputs, use_cache=False, **kwargs)
            torch.testing.assert_close(cached.scores, plain.scores, atol=1e-5, rtol=1e-5)
            self.assertEqual(cached.past_key_values.get_seq_length(), cached.sequences.shape[1] - 1)
            self.assertEqual(cached.hidden_states[-1][-1].shape[1], 1)

    def test_sample_generate(self):
        for model, inputs in self.generative_models():
            kwargs = {"do_sample": True, "num_return_sequences": 2, "top_k": 20}
            output = self.generate(model, inputs, **kwargs)
            self.check_sequences(output, inputs, rows_each=2)
            self.check_equal(output, self.generate(model, inputs, **kwargs))

    def test_sample_generate_dict_output(self):
        for model, inputs in self.generative_models():
            output = self.generate(
                model, inputs, do_sample=True, return_dict_in_generate=True, output_scores=True, output_logits=True
            )
            self.assertIsInstance(output, GenerateDecoderOnlyOutput)
            self.check_sequences(output, inputs)
            drawn = output.sequences[:, -NEW_TOKENS:]
            for step, score in enumerate(output.scores):
                self.assertTrue(score.gather(1, drawn[:, step : step + 1]).isfinite().all())

    def test_beam_search_generate(self):
        for model, inputs in self.generative_models():
            output = self.generate(model, inputs, num_beams=3, num_return_sequences=2)
            self.check_sequences(output, inputs, rows_each=2)
            best, greedy = (
                self.log_probability(model, inputs, ids) for ids in (output[::2], self.generate(model, inputs))
            )
            self.assertTrue((best > greedy - 1e-4).float().mean() > 0.5)

    def log_probability(self, model, inputs, sequences):
        length = inputs["input_ids"].shape[1]
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(sequences[:, length:])], dim=1)
        with torch.no_grad():
            logits = model(**{**inputs, "input_ids": sequences, "attention_mask": mask}).logits[:, length - 1 : -1]
        return logits.log_softmax(-1).gather(-1, sequences[:, length:, None]).sum((1, 2))

    def test_beam_search_generate_dict_output(self):
        for model, inputs in self.generative_models():
            kwargs = {"num_beams": 2, "return_dict_in_generate": True, "output_scores": True, "length_penalty": 0.0}
            output = self.generate(model, inputs, **kwargs)
            self.assertIsInstance(output, GenerateBeamDecoderOnlyOutput)
            expected = self.log_probability(model, inputs, output.sequences)
            torch.testing.assert_close(output.sequences_scores, expected, atol=1e-4, rtol=1e-4)
            self.assertEqual(output.beam_indices.shape, (len(inputs["input_ids"]), NEW_TOKENS))

    def test_beam_search_generate_dict_outputs_use_cache(self):
        for model, inputs in self.generative_models():
            kwargs = {"num_beams": 2, "return_dict_in_generate": True, "output_scores": True}
            cached, plain = (self.generate(model, inputs, use_cache=use, **kwargs) for use in (True, False))
            self.check_equal(cached.sequences, plain.sequences)
            torch.testing.assert_close(cached.sequences_scores, plain.sequences_scores, atol=1e-5, rtol=1e-5)

    def test_beam_sample_generate(self):
        for model, inputs in self.generative_models():
            output = self.generate(model, inputs, do_sample=True, num_beams=2)
            self.check_sequences(output, inputs)
            self.check_equal(output, self.generate(model, inputs, do_sample=True, num_beams=2))

    def test_generate_without_input_ids(self):
        for model, _ in self.generative_models():
            bos = model.config.get_text_config().bos_token_id
            output = self.generate(model, {}, bos_token_id=bos)
            self.assertEqual(output.shape, (1, 1 + NEW_TOKENS))
            self.assertEqual(output[0, 0].item(), bos)

    def first_row(self, inputs):
        return {key: value[:1] for key, value in inputs.items()}

    def check_assisted(self, assistant_is_the_model):
        for (model, inputs), (other, _) in zip(self.generative_models(), self.generative_models(), strict=True):
            inputs = self.first_row(inputs)
            if not assistant_is_the_model:
                with torch.no_grad():
                    for parameter in other.parameters():
                        parameter.add_(torch.randn_like(parameter) * 0.02)
            other.generation_config.num_assistant_tokens = 2
            self.check_equal(self.generate(model, inputs, assistant_model=other), self.generate(model, inputs))

    def test_assisted_decoding_matches_greedy_search_0_random(self):
        self.check_assisted(assistant_is_the_model=False)

    def test_assisted_decoding_matches_greedy_search_1_same(self):
        self.check_assisted(assistant_is_the_model=True)

    def test_assisted_decoding_sample(self):
        for (model, inputs), (other, _) in zip(self.generative_models(), self.generative_models(), strict=True):
            inputs = self.first_row(inputs)
            self.check_sequences(self.generate(model, inputs, do_sample=True, assistant_model=other), inputs)

    def test_prompt_lookup_decoding_matches_greedy_search(self):
        for model, inputs in self.generative_models():
            inputs = self.first_row(inputs)
            looked_up = self.generate(model, inputs, prompt_lookup_num_tokens=2)
            self.check_equal(looked_up, self.generate(model, inputs))

    def test_prompt_lookup_decoding_stops_at_eos(self):
        for model, inputs in self.generative_models():
            inputs = self.first_row(inputs)
            greedy = self.generate(model, inputs)
            length = inputs["input_ids"].shape[1]
            kwargs = {"prompt_lookup_num_tokens": 2, "min_new_tokens": 0, "eos_token_id": greedy[0, length].item()}
            self.check_equal(self.generate(model, inputs, **kwargs), greedy[:, : length + 1])

    def test_left_padding_compatibility(self):
        for model, inputs in self.generative_models():
            rows = len(inputs["input_ids"])
            pad = torch.full((rows, 5), model.generation_config.pad_token_id)
            padded = {
                **inputs,
                "input_ids": torch.cat([pad, inputs["input_ids"]], dim=1),
                "attention_mask": torch.cat([torch.zeros_like(pad), inputs["attention_mask"]], dim=1),
            }
            kwargs = {"return_dict_in_generate": True, "output_scores": True}
            expected, output = self.generate(model, inputs, **kwargs), self.generate(model, padded, **kwargs)
            torch.testing.assert_close(output.scores, expected.scores, atol=1e-5, rtol=1e-5)

    def test_past_key_values_format(self):
        for model, inputs in self.generative_models():
            with torch.no_grad():
                cache = model(**inputs, use_cache=True).past_key_values
            config = model.config.get_text_config()
            self.assertIsInstance(cache, DynamicCache)
            self.assertEqual(len(cache.layers), config.num_hidden_layers)
            heads = config.num_key_value_heads
            width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            for layer in cache.layers:
                self.assertEqual(
                    layer.keys.shape, (*inputs["input_ids"].shape[:1], heads, cache.get_seq_length(), width)
                )
                self.assertEqual(layer.values.shape, layer.keys.shape)

    def test_generate_from_inputs_embeds(self):
        for model, inputs in self.generative_models():
            text = self.text_only(model, inputs)
            embeds = model.get_input_embeddings()(text["input_ids"])
            mask = {"attention_mask": text["attention_mask"]}
            for kwargs in ({}, {"num_beams": 2}):
                expected = self.generate(model, text, **kwargs)
                output = self.generate(model, {**text, "inputs_embeds": embeds}, **kwargs)
                self.check_equal(output, expected)
                without_ids = self.generate(model, {**mask, "inputs_embeds": embeds}, **kwargs)
                self.check_equal(without_ids, expected[:, -NEW_TOKENS:])

    def test_generate_from_inputs_embeds_with_static_cache(self):
        for model, inputs in self.generative_models():
            text = self.text_only(model, inputs)
            embeds = model.get_input_embeddings()(text["input_ids"])
            given = {"inputs_embeds": embeds, "attention_mask": text["attention_mask"]}
            output = self.generate(model, given, cache_implementation="static", disable_compile=True)
            self.check_equal(output, self.generate(model, text)[:, -NEW_TOKENS:])

    def test_generate_continue_from_past_key_values(self):
        for model, inputs in self.generative_models():
            expected = self.generate(model, inputs, return_dict_in_generate=True).sequences
            first = self.generate(
                model,
                inputs,
                max_new_tokens=NEW_TOKENS - 1,
                min_new_tokens=NEW_TOKENS - 1,
                return_dict_in_generate=True,
            )
            mask = torch.cat([inputs["attention_mask"], torch.ones_like(first.sequences[:, 1 - NEW_TOKENS :])], dim=1)
            more = {**inputs, "input_ids": first.sequences, "attention_mask": mask}
            more["past_key_values"] = first.past_key_values
            more.pop("pixel_values", None)  # the cache holds the images
            self.check_equal(self.generate(model, more, max_new_tokens=1, min_new_tokens=1), expected)

    def test_generate_continue_from_inputs_embeds(self):
        for model, inputs in self.generative_models():
            text, half = self.text_only(model, inputs), NEW_TOKENS // 2
            embed = model.get_input_embeddings()
            expected = self.generate(model, text)[:, -NEW_TOKENS:]
            given = {"inputs_embeds": embed(text["input_ids"]), "attention_mask": text["attention_mask"]}
            short = {"max_new_tokens": half, "min_new_tokens": half, "return_dict_in_generate": True}
            first = self.generate(model, given, **short)
            given = {
                "inputs_embeds": torch.cat([given["inputs_embeds"], embed(first.sequences)], dim=1),
                "attention_mask": torch.cat([text["attention_mask"], torch.ones_like(first.sequences)], dim=1),
                "past_key_values": first.past_key_values,
            }
            rest = self.generate(model, given, **short)
            self.check_equal(torch.cat([first.sequences, rest.sequences], dim=1), expected)

    def test_generate_with_static_cache(self):
        for model, inputs in self.generative_models():
            output = self.generate(
                model, inputs, cache_implementation="static", return_dict_in_generate=True, disable_compile=True
            )
            self.check_equal(output.sequences, self.generate(model, inputs))
            self.assertIsInstance(output.past_key_values, StaticCache)

    def test_forward_with_logits_to_keep(self):
        for model, inputs in self.generative_models():
            with torch.no_grad():
                full, last = model(**inputs).logits, model(**inputs, logits_to_keep=2).logits
            self.assertEqual(last.shape[1], 2)
            torch.testing.assert_close(last, full[:, -2:], atol=1e-5, rtol=1e-5)

    def test_generate_methods_with_logits_to_keep(self):
        for model, inputs in self.generative_models():
            for kwargs in ({}, {"num_beams": 2}):
                self.check_equal(
                    self.generate(model, inputs, logits_to_keep=0, **kwargs), self.generate(model, inputs, **kwargs)
                )

    def test_eager_matches_sdpa_generate(self):
        for model, inputs in self.generative_models():
            outputs = []
            for implementation in ("eager", "sdpa"):
                model.set_attn_implementation(implementation)
                outputs.append(self.generate(model, inputs, return_dict_in_generate=True, output_scores=True).scores)
            torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)

    def test_custom_4d_attention_mask(self):
        for model, inputs in self.generative_models():
            rows, length = inputs["input_ids"].shape
            allowed = torch.ones(length, length, dtype=torch.bool).tril()[None, None].expand(rows, 1, -1, -1)
            mask = torch.zeros(rows, 1, length, length).masked_fill(~allowed, torch.finfo(torch.float32).min)
            with torch.no_grad():
                expected = model(**inputs).logits
                logits = model(**{**inputs, "attention_mask": mask}).logits
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
