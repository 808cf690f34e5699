"""Text and images to tensors: LaVIN's text format as a chat template, its image preprocessing, its checks."""

import json

from tokenizers import AddedToken, Tokenizer
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast
from transformers.image_utils import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
    PILImageResampling,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.processing_utils import ProcessorMixin

from .configuration_lavin import default_vision_feature_layers, vision_part


IMAGE_TOKEN = "<image>"

# LaVIN's format: [BOS] "Image: " <image tokens> prompt answer [EOS], or "Image: N/A" where there is no image. The
# reference tokenises prefix, image and prompt apart, so each begins with its own word-start marker. The tokenizer of a
# LaVIN adds no such marker by itself (see `_without_word_start`): the template writes the spaces. Then one string, and
# prompt and completion tokenised apart as TRL does, give the same ids.
#
# Beyond the format: a system message is a line before "Image:"; a later user turn has the "Image:" header only if it
# brings images (so a longer conversation begins with the shorter one's ids); an answer follows "Response:", which is
# appended on a line of its own where the user's text does not end with it already.
DEFAULT_CHAT_TEMPLATE = """\
{#- One message's parts in their order. A text or image that follows another kind begins with a space. -#}
{%- macro render(content, last) -%}
    {%- if content is string -%}
        {%- set content = [{'type': 'text', 'text': content}] -%}
    {%- endif -%}
    {%- set seen = namespace(last=last) -%}
    {%- for part in content or [] -%}
        {%- if part.type == 'image' -%}
            {{- (' ' if seen.last != 'image' else '') + '<image>' -}}
        {%- elif part.type == 'text' -%}
            {#- An image token typed by the user is text: it must not become an image. -#}
            {{- (' ' if seen.last != 'text' and part.text else '') + part.text | replace('<image>', '<image >') -}}
        {%- else -%}
            {{- raise_exception('LaVIN reads parts of type "text" and "image", got "' ~ part.type ~ '".') -}}
        {%- endif -%}
        {%- set seen.last = part.type if part.type == 'image' or part.text else seen.last -%}
    {%- endfor -%}
{%- endmacro -%}
{{- bos_token -}}
{%- set turn = namespace(header=false, asked=false) -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}
        {{- render(message.content, 'header') ~ '\\n' -}}
    {%- elif message.role == 'user' -%}
        {%- set images = [] if message.content is string
            else (message.content or []) | selectattr('type', 'equalto', 'image') | list -%}
        {{- ' Image:' if images else ('' if turn.header else ' Image: N/A') -}}
        {%- set text = render(message.content, 'header') -%}
        {{- text -}}
        {%- set turn.header = true -%}
        {%- set turn.asked = text.rstrip().endswith('Response:') -%}
    {%- elif message.role == 'assistant' -%}
        {{- '' if turn.asked else '\\nResponse:' -}}
        {%- set text = render(message.content, 'text') -%}
        {%- generation -%}{{- text -}}{{- eos_token -}}{%- endgeneration -%}
        {%- set turn.asked = false -%}
    {%- else -%}
        {{- raise_exception('LaVIN knows the roles "system", "user" and "assistant", got "' ~ message.role ~ '".') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and not turn.asked -%}{{- '\\nResponse:' -}}{%- endif -%}
"""


class LavinProcessor(ProcessorMixin):
    r"""
    Image processor and tokenizer of a LaVIN in one.

    Args:
        image_processor ([`CLIPImageProcessorPil`], *optional*):
            Any image processor that returns `pixel_values` of one shape.
        tokenizer ([`PreTrainedTokenizerFast`], *optional*):
            A fast tokenizer that holds `image_token` as one token.
        num_image_tokens (`int`, *optional*, defaults to 6):
            Image tokens of one image: `LavinConfig.num_image_tokens`.
        image_token (`str`, *optional*, defaults to `"<image>"`):
            Where an image goes in a text that is passed to `__call__`. Each becomes `num_image_tokens` tokens. Typed
            inside the content of a chat message it is text like any other and reaches the model as `"<image >"`.
        chat_template (`str`, *optional*):
            Jinja template of a conversation; [`~LavinProcessor.from_vision_text_pretrained`] gives LaVIN's own.

    Images are passed as one list per row (`[[image, image], [], [image]]`), also as a flat list where that is
    unambiguous. Batches are padded on the left unless `padding_side` says otherwise.

    Raises:
        `ValueError`: if a row's images and image slots differ in number, an image cannot be read, truncation cuts image
        tokens, or the tokenizer is slow or does not hold `image_token`.

    Example:

    ```python
    >>> from lavin import LavinProcessor
    >>> processor = LavinProcessor.from_vision_text_pretrained("openai/clip-vit-large-patch14", "huggyllama/llama-7b")
    >>> messages = [{"role": "user", "content": [{"type": "image", "path": "cat.png"}, {"type": "text", "text": "Who?"}]}]
    >>> inputs = processor.apply_chat_template(
    ...     messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    ... )
    ```
    """

    _auto_class = "AutoProcessor"  # saving writes `auto_map` and this file with it
    text_kwargs = {"padding_side": "left"}

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        num_image_tokens: int = 6,
        image_token: str = IMAGE_TOKEN,
        chat_template=None,
        **kwargs,
    ):
        if num_image_tokens < 1:
            raise ValueError(f"`num_image_tokens` must be at least 1, got {num_image_tokens}.")
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        if not tokenizer.is_fast:
            raise ValueError(
                f"LavinProcessor needs a fast tokenizer, got {type(tokenizer).__name__}: only a fast one knows which "
                "characters a token stands for (assistant-only loss). Build it with "
                "`LavinProcessor.from_vision_text_pretrained(vision, text)`."
            )
        if image_token not in tokenizer.get_added_vocab():
            raise ValueError(
                f"The tokenizer has no token {image_token!r}. Build the processor with "
                "`LavinProcessor.from_vision_text_pretrained(vision, text)`, which adds it, or name a token it has "
                "with `image_token`."
            )
        self.num_image_tokens = num_image_tokens
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision: str,
        text: str,
        num_image_tokens: int | None = None,
        preprocessing: str = "lavin",
        image_token: str = IMAGE_TOKEN,
        chat_template: str | None = None,
        vision_revision: str | None = None,
        text_revision: str | None = None,
        **kwargs,
    ) -> "LavinProcessor":
        r"""
        The processor of a LaVIN made of two checkpoints.

        Args:
            vision (`str`): Folder or Hub name of the vision tower or of a whole CLIP or SigLIP checkpoint.
            text (`str`): Folder or Hub name of the language model.
            num_image_tokens (`int`, *optional*): Defaults to one for every fourth block of the vision tower.
            preprocessing (`str`, *optional*, defaults to `"lavin"`):
                `"lavin"`: squashed to the tower's square, ImageNet's mean and standard deviation, as the released
                adapters were trained. `"clip"`: CLIP's own, shortest edge and centre crop, CLIP's mean and deviation.
            image_token (`str`, *optional*, defaults to `"<image>"`): Added to the tokenizer where it is new.
            chat_template (`str`, *optional*): Defaults to LaVIN's format.
            vision_revision, text_revision (`str`, *optional*): Default to `revision` among the `kwargs`.
            kwargs: Passed to `from_pretrained` of configuration and tokenizer (`token`, `cache_dir`, ...).
        """
        revision = kwargs.pop("revision", None) or "main"
        config = vision_part(AutoConfig.from_pretrained(vision, revision=vision_revision or revision, **kwargs))
        if getattr(config, "image_size", None) is None:
            raise ValueError(
                f"{vision} is no vision tower: its configuration ({config.model_type}) has no `image_size`."
            )
        if num_image_tokens is None:
            num_image_tokens = len(default_vision_feature_layers(config.num_hidden_layers))
        tokenizer = AutoTokenizer.from_pretrained(text, revision=text_revision or revision, **kwargs)
        tokenizer = _without_word_start(tokenizer)
        tokenizer.add_special_tokens(
            {"extra_special_tokens": [AddedToken(image_token, special=True, normalized=False)]},
            replace_extra_special_tokens=False,
        )
        if chat_template is None:
            chat_template = DEFAULT_CHAT_TEMPLATE.replace("<image >", _broken(image_token))
            chat_template = chat_template.replace(IMAGE_TOKEN, image_token)
        tokenizer.chat_template = chat_template  # not the base model's: a reloaded folder has one template for both
        return cls(
            image_processor=_image_processor(config.image_size, preprocessing),
            tokenizer=tokenizer,
            num_image_tokens=num_image_tokens,
            image_token=image_token,
            chat_template=chat_template,
        )

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.image_token * self.num_image_tokens

    def apply_chat_template(self, conversation, *args, **kwargs):
        """As [`~ProcessorMixin.apply_chat_template`]; an image token typed in a message's text stays text, whatever
        the template."""
        return super().apply_chat_template(self._break_typed_tokens(conversation), *args, **kwargs)

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        if images is not None:
            if isinstance(images, (list, tuple)) and any(
                isinstance(row, (list, tuple)) or row is None for row in images
            ):
                images = [
                    [self._read_image(image, f"image {i} of row {row}") for i, image in enumerate(_as_list(of_row))]
                    for row, of_row in enumerate(images)
                ]
                images = images if any(images) else None
            else:
                images = [self._read_image(image, f"image {i}") for i, image in enumerate(_as_list(images))] or None
        images, text, videos, audio = super().prepare_inputs_layout(images, text, videos, audio, **kwargs)
        # A rendered template has its BOS already; a tokenizer that adds one by itself would write it twice.
        bos = self.tokenizer.bos_token
        special = kwargs.get("add_special_tokens", kwargs.get("text_kwargs", {}).get("add_special_tokens", True))
        if text is not None and bos and special and self.tokenizer("").input_ids[:1] == [self.tokenizer.bos_token_id]:
            text = [sample.removeprefix(bos) if isinstance(sample, str) else sample for sample in text]
        return images, text, videos, audio

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        # The base compares the sums of the batch: a slot too many in one row would take the next row's image.
        if isinstance(text, list) and all(isinstance(sample, str) for sample in text):
            slots = [sample.count(self.image_token) for sample in text]
            if images is None:
                counts = [0] * len(text)
            elif isinstance(images[0], list):
                counts = [len(of_row) for of_row in images]
            elif len(text) == 1:
                counts = [len(images)]
            elif len(images) == len(text):  # a flat list of one image each
                counts = [1] * len(text)
            else:  # a flat list in reading order
                counts = slots if len(images) == sum(slots) else [len(images)]
            how = "Pass one list of images per row, `images=[[first, second], [], ...]`, an empty one where there is none."
            if len(counts) != len(text):
                raise ValueError(
                    f"{len(text)} texts with {slots} image slots ({self.image_token}), but images for {counts}. {how}"
                )
            for row, (slot, count) in enumerate(zip(slots, counts, strict=True)):
                if slot != count:
                    raise ValueError(
                        f"Row {row} has {slot} image slots ({self.image_token}) in its text, but {count} images. Write "
                        f"one slot per image, in a chat one content part of type 'image' each. {how}"
                    )
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def _read_image(self, image, where: str):
        try:
            image = self.image_processor.fetch_images(image)
            if hasattr(image, "convert"):  # PIL reads lazily: a broken file shows itself here
                image = image.convert("RGB")
        except Exception as error:
            source = f" ({image[:100]!r})" if isinstance(image, str) else ""
            raise ValueError(
                f"Cannot read {where}{source}: {error}. Pass a PIL image, an array, or the path, URL or base64 text of "
                "an image file that can be decoded; leave the row out or repair the file."
            ) from error
        return image

    def _resolve_chat_template(self, chat_template: str | None = None) -> str:
        if chat_template is None and self.chat_template is None:
            raise ValueError(
                "This processor has no chat template (`chat_template.jinja` is missing from its folder?). Pass "
                "`chat_template=...`, or set `processor.chat_template`; `DEFAULT_CHAT_TEMPLATE` beside the class is "
                "LaVIN's own."
            )
        return super()._resolve_chat_template(chat_template)

    def _check_special_mm_tokens(self, text, text_inputs, modalities):
        ids = text_inputs["input_ids"]
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        for row, (sample, row_ids) in enumerate(zip(text, ids, strict=True)):
            expected, found = sample.count(self.image_token), row_ids.count(self.image_token_id)
            if found != expected:
                # TRL knows the first words and adds its own advice.
                raise ValueError(
                    f"Image features and image tokens do not match, tokens: {found}, features: {expected} in row "
                    f"{row}: truncation has cut image tokens off. Raise `max_length` or turn truncation off."
                )

    def _break_typed_tokens(self, messages):
        """A copy of the conversation (or of several) in which no text, nor two texts in a row, holds the image token."""
        if messages and isinstance(messages[0], (list, tuple)):
            return [self._break_typed_tokens(conversation) for conversation in messages]
        token, tail = self.image_token, ""

        def clean(text: str) -> str:
            nonlocal tail
            text = text.replace(token, _broken(token))
            if token in tail + text:
                text = " " + text
            tail = (tail + text)[1 - len(token) :]
            return text

        def clean_parts(item):
            nonlocal tail
            if isinstance(item, (list, tuple)):
                return [clean_parts(part) for part in item]
            if isinstance(item, dict):
                tail = "" if item.get("type") == "image" else tail
                item = {key: clean_parts(item[key]) if key in ("content", "text") else item[key] for key in item}
            return clean(item) if isinstance(item, str) else item

        return clean_parts(messages)


def _broken(image_token: str) -> str:
    """The image token as readable text that is no token."""
    return f"{image_token[:-1]} {image_token[-1]}"


def _as_list(images) -> list:
    if images is None:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _image_processor(image_size, preprocessing: str) -> CLIPImageProcessorPil:
    height, width = image_size if isinstance(image_size, (list, tuple)) else (image_size, image_size)
    square = {"height": height, "width": width}
    if preprocessing == "lavin":
        return CLIPImageProcessorPil(
            size=square,
            resample=PILImageResampling.BICUBIC,
            do_center_crop=False,
            image_mean=IMAGENET_DEFAULT_MEAN,
            image_std=IMAGENET_DEFAULT_STD,
        )
    if preprocessing == "clip":
        return CLIPImageProcessorPil(
            size={"shortest_edge": min(height, width)},
            resample=PILImageResampling.BICUBIC,
            crop_size=square,
            image_mean=OPENAI_CLIP_MEAN,
            image_std=OPENAI_CLIP_STD,
        )
    raise ValueError(f'`preprocessing` must be "lavin" or "clip", got {preprocessing!r}.')


def _without_word_start(tokenizer) -> PreTrainedTokenizerFast:
    """
    The same vocabulary without the word-start marker that SentencePiece-like tokenizers put before every text: TRL
    tokenises prompt and completion apart, and the answer would begin with "▁The" instead of "The".
    """
    if not tokenizer.is_fast:
        raise ValueError(f"LaVIN needs a fast tokenizer, and {type(tokenizer).__name__} has no fast version.")
    spec = json.loads(tokenizer.backend_tokenizer.to_str())

    def strip(node):
        if isinstance(node, list):
            return [strip(child) for child in node if not _adds_word_start(child)]
        if not isinstance(node, dict):
            return node
        node = {key: strip(value) for key, value in node.items()}
        if node.get("type") == "Metaspace":
            node["prepend_scheme"] = "never"
        if node.get("type") == "ByteLevel":
            node["add_prefix_space"] = False
        return node

    for part in ("normalizer", "pre_tokenizer", "decoder"):
        spec[part] = None if _adds_word_start(spec[part]) else strip(spec[part])

    kwargs = {"model_max_length": tokenizer.model_max_length, "truncation_side": tokenizer.truncation_side}
    kwargs |= tokenizer.special_tokens_map
    result = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(spec)),
        padding_side="left",
        extra_special_tokens=list(tokenizer.extra_special_tokens),
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **kwargs,
    )
    if result.pad_token is None:
        result.pad_token = _pad_token(result)
    return result


def _adds_word_start(node) -> bool:
    # `Strip` is the decoder's counterpart of `Prepend`.
    return isinstance(node, dict) and node.get("type") in ("Prepend", "Strip")


def _pad_token(tokenizer) -> str | None:
    """
    A token for padding that is never a label: collators that hide the pad token's id from the loss would hide EOS with
    it, and the model would not learn to stop. Only tokens that have a row in the embedding count. Where every special
    token is EOS (GPT-2), EOS it is: TRL takes its labels from the attention mask and is not affected.
    """
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    spare = [token for word in ("pad", "reserved") for token in special if word in token]
    for token in [tokenizer.unk_token, *spare]:
        if token and token not in (tokenizer.bos_token, tokenizer.eos_token):
            return token
    return tokenizer.eos_token


__all__ = ["LavinProcessor"]
