"""Text and images to tensors: LaVIN's text format as a chat template, its image preprocessing, its checks."""

import os
import re
from itertools import groupby

from transformers.image_utils import is_valid_image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.processing_utils import MultiModalData, ProcessorMixin

from .files_lavin import installed
from .images_lavin import read_image


# LaVIN's format: [BOS] "Image: " <image tokens> prompt answer [EOS], or "Image: N/A" where there is no image. The
# reference tokenises prefix, image and prompt apart, so each begins with its own word-start marker. The tokenizer of a
# LaVIN adds no such marker by itself (`without_word_start`): the template writes the spaces. Then one string, and
# prompt and completion tokenised apart as TRL does, give the same ids.
#
# Beyond the format: a system message is a line before "Image:"; a later user turn has the "Image:" header only if it
# brings images (a longer conversation begins with the shorter one's ids); an answer follows "Response:", appended as a
# line where the user's text does not end with it already; assistant messages in a row are one answer. The template
# writes parts in their order; `LavinProcessor.image_order` says which order that is.
DEFAULT_CHAT_TEMPLATE = """\
{#- One message's parts in their order. A text or image that follows another kind begins with a space. -#}
{%- macro render(content, last) -%}
    {%- set seen = namespace(last=last) -%}
    {%- for part in ([{'type': 'text', 'text': content}] if content is string else content or []) -%}
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
        {%- set text = render(message.content, 'header') -%}{{- text -}}
        {%- set turn.header = true -%}
        {%- set turn.asked = text.rstrip().endswith('Response:') -%}
    {%- elif message.role == 'assistant' -%}
        {{- '' if turn.asked else '\\nResponse:' -}}
        {%- set text = render(message.content, 'text') -%}
        {%- set turn.asked = not loop.last and loop.nextitem.role == 'assistant' -%}
        {%- generation -%}{{- text -}}{{- '' if turn.asked else eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {{- raise_exception('LaVIN knows the roles "system", "user" and "assistant", got "' ~ message.role ~ '".') -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and not turn.asked -%}{{- '\\nResponse:' -}}{%- endif -%}
"""


HALF = re.compile("[\ud800-\udfff]")  # what Python makes of bytes that are no UTF-8


class LavinProcessor(ProcessorMixin):
    r"""
    Image processor and tokenizer of a LaVIN in one.

    Args:
        image_processor ([`CLIPImageProcessorPil`], *optional*):
            Any image processor that returns `pixel_values` of one shape.
        tokenizer ([`PreTrainedTokenizerFast`], *optional*):
            A fast tokenizer that holds `image_token` as one token.
        num_image_tokens (`int`):
            Image tokens of one image: `LavinConfig.num_image_tokens`.
        image_token (`str`, *optional*, defaults to `"<image>"`):
            Where an image goes in a text that is passed to `__call__`. Each becomes `num_image_tokens` tokens. Typed
            inside the content of a chat message it is text like any other and reaches the model as `"<image >"`.
        chat_template (`str`, *optional*):
            Jinja template of a conversation; [`~LavinProcessor.from_vision_text_pretrained`] gives LaVIN's own.
        image_order (`str`, *optional*, defaults to `"first"`):
            Where the images of a turn stand. `"first"`: before its text, in their order, wherever the messages have
            them: the only order that the released format knows. `"interleaved"`: where the messages have them, for a
            model that is trained so. Training, evaluation and serving read it from the processor.

    Images are passed as one list per row (`[[image, image], [], [image]]`), or as a flat list where that is
    unambiguous; an array of four dimensions is a list of its images. Arrays and tensors are read as the same picture
    from a file is: integers of 8 to 16 bits or floats, in [0, 1] or [0, 255]; with `do_rescale=False` their values are
    taken as they are. Batches are padded on the left unless `padding_side` says otherwise.

    Raises:
        `ValueError`: if a row's images and image slots differ in number, an image cannot be read, truncation cuts
        image tokens, there is no template, or the tokenizer is slow or does not hold `image_token`.

    Example:

    ```python
    >>> from lavin import LavinProcessor
    >>> processor = LavinProcessor.from_vision_text_pretrained("openai/clip-vit-large-patch14", "huggyllama/llama-7b")
    >>> content = [{"type": "image", "path": "cat.png"}, {"type": "text", "text": "Who is this?"}]
    >>> processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    '<s> Image: <image> Who is this?\nResponse:'
    ```
    """

    _auto_class = "AutoProcessor"  # saving writes `auto_map` and this file with it

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        num_image_tokens: int | None = None,
        image_token: str = "<image>",
        chat_template=None,
        image_order: str = "first",
        **kwargs,
    ):
        if image_order not in ("first", "interleaved"):
            raise ValueError(f'`image_order` must be "first" or "interleaved", got {image_order!r}.')
        if num_image_tokens is None:
            raise ValueError("Pass `num_image_tokens`: the model's `config.num_image_tokens`.")
        if num_image_tokens < 1:
            raise ValueError(f"`num_image_tokens` must be at least 1, got {num_image_tokens}.")
        if type(image_processor).__name__ == "CLIPImageProcessor":
            # What AutoImageProcessor makes of a saved PIL one where torchvision is installed; it resizes otherwise.
            image_processor = CLIPImageProcessorPil.from_dict(image_processor.to_dict())
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        if not tokenizer.is_fast or image_token not in tokenizer.get_added_vocab():
            raise ValueError(
                f"LavinProcessor needs a fast tokenizer that holds {image_token!r} as an added token, got "
                f"{type(tokenizer).__name__}. `LavinProcessor.from_vision_text_pretrained(vision, text)` builds it."
            )
        if "padding_side" not in tokenizer.init_kwargs:  # nobody has chosen one: the side that generation needs
            tokenizer.padding_side = "left"
        self.num_image_tokens = num_image_tokens
        self.image_order = image_order
        self.image_token = image_token
        self.image_token_id = tokenizer.convert_tokens_to_ids(image_token)

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision: str,
        text: str,
        num_image_tokens: int | None = None,
        preprocessing: str = "lavin",
        image_token: str = "<image>",
        chat_template: str | None = None,
        vision_revision: str | None = None,
        text_revision: str | None = None,
        image_size: int | None = None,
        image_order: str = "first",
        **kwargs,
    ) -> "LavinProcessor":
        r"""
        The processor of a LaVIN made of two checkpoints.

        Args:
            vision, text (`str`): Folders or Hub names of a vision tower (or whole CLIP, SigLIP) and a language model.
            num_image_tokens (`int`, *optional*):
                The model's `config.num_image_tokens`; defaults to one for every fourth block of the vision tower.
            preprocessing (`str`, *optional*, defaults to `"lavin"`):
                `"lavin"`: squashed to the tower's square, ImageNet's mean and standard deviation, as the released
                adapters were trained. `"clip"`: CLIP's own, shortest edge and centre crop, CLIP's mean and deviation.
            image_token (`str`, *optional*, defaults to `"<image>"`): Added to the tokenizer where it is new.
            chat_template (`str`, *optional*): Defaults to LaVIN's format.
            vision_revision, text_revision (`str`, *optional*): Default to `revision` among the `kwargs`.
            image_size (`int`, *optional*):
                Pixels on each side of an image, the model's `config.image_size`; defaults to the vision tower's.
            image_order (`str`, *optional*, defaults to `"first"`): `"first"` or `"interleaved"`, see above.
            kwargs: For `from_pretrained` of configuration and tokenizer (`token`, `cache_dir`, ...).
        """
        return installed("pair").processor_of_pair(
            cls, vision, text, num_image_tokens, preprocessing, image_token, chat_template, vision_revision,
            text_revision, image_size, image_order, **kwargs,
        )  # fmt: skip

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        return self.image_token * self.num_image_tokens

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """How many image tokens images of these sizes become, for engines that plan ahead: whatever size, the same."""
        if image_sizes is None:
            return MultiModalData()
        count = len(image_sizes)
        return MultiModalData(num_image_tokens=[self.num_image_tokens] * count, num_image_patches=[1] * count)

    def to_dict(self, *args, **kwargs):
        output = super().to_dict(*args, **kwargs)
        output["image_processor"].pop("auto_map", None)  # where to find this class, not the image processor's
        return output

    def save_pretrained(self, save_directory, *args, **kwargs):
        saved = super().save_pretrained(save_directory, *args, **kwargs)
        for part in (self, self.image_processor):  # what transformers notes there in order to write it
            vars(part).pop("auto_map", None)
        return saved

    def apply_chat_template(self, conversation, chat_template: str | None = None, **kwargs):
        """
        [`~ProcessorMixin.apply_chat_template`] with the images where `image_order` has them, and with special tokens
        that are typed in a text as text, in every template.
        """
        if chat_template is None and self.chat_template is None:
            raise ValueError(
                "This processor has no chat template (is `chat_template.jinja` missing from its folder?). Pass "
                "`chat_template=...` or set `processor.chat_template`; LaVIN's own is `DEFAULT_CHAT_TEMPLATE`."
            )
        if self.image_order == "first":
            conversation = _images_first(conversation)
        return super().apply_chat_template(self._break_typed_tokens(conversation), chat_template, **kwargs)

    def prepare_inputs_layout(self, images=None, text=None, videos=None, audio=None, **kwargs):
        if images is not None:
            rows = _as_list(images)
            nested = any(row is None or isinstance(row, (list, tuple)) or _is_batch(row) for row in rows)
            rows = [
                [image for part in _as_list(row) for image in _as_list(part)] for row in (rows if nested else [rows])
            ]
            settings = {**kwargs, **kwargs.get("images_kwargs", {})}
            images = [
                [self._read_image(image, i, n if nested else None, settings) for i, image in enumerate(row)]
                for n, row in enumerate(rows)
            ]
            images = None if not any(images) else images if nested else images[0]
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
                counts = [len(row) for row in images]
            elif len(images) == len(text) > 1:  # a flat list of one image each
                counts = [1] * len(text)
            else:  # a flat list in reading order
                counts = slots if len(images) == sum(slots) else [len(images)]
            how = (
                "Image tokens in the prompts should be the same as the number of images in each row: pass one list of "
                "images per row, `images=[[first, second], [], ...]`."
            )
            if len(counts) != len(text):
                raise ValueError(f"{len(text)} texts with {slots} image slots, but images for {counts}. {how}")
            for row, (slot, count) in enumerate(zip(slots, counts, strict=True)):
                if slot != count:
                    raise ValueError(
                        f"Row {row} has {slot} image slots ({self.image_token}) in its text, but {count} images. "
                        f"Write one slot per image; in a chat that is a content part of type 'image'. {how}"
                    )
        super().validate_inputs(images=images, text=text, videos=videos, audio=audio, **kwargs)

    def _read_image(self, image, index: int, row: int | None, settings: dict):
        is_array = is_valid_image(image) and not hasattr(image, "convert")
        if is_array and not settings.get("do_rescale", getattr(self.image_processor, "do_rescale", True)):
            return image  # its values are on the scale that is wanted, says the caller
        try:
            return read_image(image, settings.get("input_data_format"))
        except Exception as error:  # Pillow's decoders raise all sorts
            where = f"image {index}" + ("" if row is None else f" of row {row}")
            source = f" ({os.fspath(image)[:100]!r})" if isinstance(image, (str, os.PathLike)) else ""
            raise ValueError(
                f"Cannot read {where}{source}: {error}. Pass a PIL image, an array, or the path, URL or base64 text "
                "of an image file that can be decoded; repair the file or leave its row out."
            ) from error

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
        """A copy of the conversation(s) in which no text, nor two texts in a row, holds a special token."""
        if messages and isinstance(messages[0], (list, tuple)):
            return [self._break_typed_tokens(conversation) for conversation in messages]
        special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        special = sorted({token for token in special if len(token) > 1} | {self.image_token}, key=len, reverse=True)
        typed, longest = re.compile("|".join(map(re.escape, special))), len(special[0])
        tail = ""  # of the text before, where it could begin a token

        def clean(item):
            nonlocal tail
            if isinstance(item, (list, tuple)):
                return [clean(part) for part in item]
            if isinstance(item, dict):
                tail = "" if _is_image(item) else tail
                return {key: clean(value) if key in ("content", "text") else value for key, value in item.items()}
            if isinstance(item, str):
                if HALF.search(item):
                    raise ValueError(f"{item[:60]!r} is no text that can be encoded: it holds half of a character.")
                item = typed.sub(lambda found: broken(found[0]), item)
                item = " " + item if typed.search(tail + item) else item
                tail = (tail + item)[1 - longest :]
            return item

        return clean(messages)


def broken(token: str) -> str:
    """A special token as readable text that is no token."""
    return f"{token[:-1]} {token[-1]}"


def _is_image(part) -> bool:
    return isinstance(part, dict) and part.get("type") in ("image", "image_url")


def _images_first(messages):
    """A copy of the conversation(s) with the images of each turn, user messages in a row, before its text."""
    if not messages or isinstance(messages[0], (list, tuple)):
        return [_images_first(conversation) for conversation in messages]
    result = []
    for of_user, run in groupby(messages, key=lambda message: message.get("role") == "user"):
        for turn in [list(run)] if of_user else [[message] for message in run]:
            contents = [message.get("content") or [] for message in turn]
            contents = [[{"type": "text", "text": c}] if isinstance(c, str) else list(c) for c in contents]
            if images := [part for content in contents for part in content if _is_image(part)]:
                contents = [_without_images(content) for content in contents]
                contents[0] = images + contents[0]
                turn = [m | {"content": content} for m, content in zip(turn, contents, strict=True) if content]
            result += turn
    return result


def _without_images(parts: list) -> list:
    """The other parts; where an image stood between two words, a space."""
    left, moved = [], False
    for part in parts:
        if _is_image(part):
            moved = True
            continue
        words = left[-1].get("text") if left else None
        if moved and words and part.get("text") and not (words[-1].isspace() or part["text"][0].isspace()):
            part = {**part, "text": f" {part['text']}"}
        left.append(part)
        moved = False
    return left


def _as_list(images) -> list:
    if isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4:
        return list(images)
    return [] if images is None else [images]


def _is_batch(images) -> bool:
    """Whether this is an array of several images."""
    return getattr(images, "ndim", 0) == 4 and len(images) != 1


__all__ = ["LavinProcessor"]
