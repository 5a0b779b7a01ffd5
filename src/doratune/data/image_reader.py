"""What reads the examples of a model of images and text: its processor, with the face of a tokenizer.

A text is tokenized with one placeholder an image, and each placeholder is then replaced by the tokens that the processor
puts there for an image of that size. So no token of an image is ever part of an answer, whatever a family's image looks like
in text (LLaVA's 576 marks, SmolVLM's tiles with rows and columns, Qwen-VL's grid), and a length is known before any pixel is
computed. The pixels come with the batch: `inputs` is what the processor makes of its images.

Source: transformers' processors. Cost: one blank image a size through the processor; decoding each image once, and once an
epoch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..errors import UserError
from ..support.image_text import load_processor
from ..support.models import load_tokenizer, reads_images
from .image_sources import ImageSource, opened

if TYPE_CHECKING:
    from PIL import Image

TYPES = ("mm_token_type_ids", "token_type_ids")
"""Inputs that say which tokens are an image's."""
CHECKED = 3
"""Items whose tokens are held against the processor's own."""
_TEXT = ("input_ids", "attention_mask", *TYPES)


class ImageReader:
    """The processor of a model of images and text; everything that it does not say itself is its tokenizer's.

    Attributes:
        processor, tokenizer: the tokenizer has the processor's chat template. mark: the placeholder's token.
        type_names: which of TYPES the model wants. in_parts: a template gets the content of a turn as a list of parts."""

    in_parts = True

    def __init__(self, processor, name: str = ""):
        self.processor, self.name = processor, name or getattr(processor.tokenizer, "name_or_path", "")
        self.tokenizer = copy.copy(processor.tokenizer)
        if getattr(processor, "chat_template", None):
            self.tokenizer.chat_template = processor.chat_template
        self.mark = self._placeholder()
        self._sizes: dict[tuple[int, int], list[int]] = {}
        self.type_names: tuple[str, ...] = ()
        self.checked = 0
        self.expansion((64, 64))

    def __getattr__(self, name: str):
        if name == "tokenizer":  # not there yet: while it is copied
            raise AttributeError(name)
        return getattr(self.tokenizer, name)

    def __call__(self, *args, **settings):
        return self.tokenizer(*args, **settings)

    def __len__(self) -> int:
        return len(self.tokenizer)

    def save_pretrained(self, folder) -> None:
        self.processor.save_pretrained(folder)

    def _placeholder(self) -> int:
        """The token that a template writes for an image.

        Raises:
            UserError: no chat template, or none of the processor's tokens is in what it writes.
        """
        if self.tokenizer.chat_template is None:
            raise UserError(f"{self.name} has no chat template; take one whose processor has (chat_template.jinja)")
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}
        text = self.tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=False)
        for name in ("boi_token", "image_token"):
            word = getattr(self.processor, name, None)
            ids = self.tokenizer(str(word), add_special_tokens=False)["input_ids"] if word else []
            if len(ids) == 1 and str(word) in text:
                self.word = str(word)
                return ids[0]
        raise UserError(f"the chat template of {self.name} writes no image token of its processor; it takes no images this way")

    def expansion(self, size: tuple[int, int]) -> list[int]:
        """The tokens of one image of (width, height).

        Raises:
            UserError: the processor does not take such an image.
        """
        if size not in self._sizes:
            from PIL import Image

            try:
                inputs = self.processor(images=[[Image.new("RGB", size)]], text=[self.word], add_special_tokens=False)
            except Exception as error:  # a processor is a program of others
                reason = next(iter(str(error).splitlines()), type(error).__name__)[:200]
                raise UserError(
                    f"an image of {size[0]} × {size[1]} pixels, which the model's processor refuses ({reason})"
                ) from None
            self._sizes[size] = list(inputs["input_ids"][0])
            self.type_names = tuple(name for name in TYPES if name in inputs)
        return self._sizes[size]

    def expanded(self, ids: Sequence[int], sources: Sequence[ImageSource]) -> tuple[list[int], list[int]]:
        """(the tokens with each placeholder replaced, the place in `ids` that each comes from).

        Raises:
            UserError: an image that cannot be read, or as many placeholders as images there are not.
        """
        count = sum(token == self.mark for token in ids)
        if count != len(sources):
            raise UserError(f"the chat template of {self.name} places {count} of {len(sources)} images; mend the conversation")
        images = iter(sources)
        whole, places = [], []
        for place, token in enumerate(ids):
            part = self._of_size(next(images)) if token == self.mark else [token]
            whole += part
            places += [place] * len(part)
        return whole, places

    def check(self, text: str, sources: Sequence[ImageSource], ids: Sequence[int]) -> None:
        """Hold the tokens of a text against those of the processor itself, for the first items with images.

        Raises:
            UserError: they differ.
        """
        if not sources or self.checked == CHECKED:
            return
        self.checked += 1
        images = [[opened(source) for source in sources]]
        theirs = self.processor(images=images, text=[text], add_special_tokens=False)["input_ids"][0]
        if list(theirs) != list(ids):
            raise UserError(f"the processor of {self.name} puts more than the image into the text; its family is not supported")

    def _of_size(self, source: ImageSource) -> list[int]:
        image = opened(source)
        try:
            return self.expansion(image.size)
        except UserError as error:
            raise UserError(f"{source.shown}: {error}") from None

    def question(self, text: str, sources: Sequence[ImageSource]) -> list[int]:
        """The tokens of a question about images, up to where the answer begins."""
        content = [*({"type": "image"} for _ in sources), {"type": "text", "text": text}]
        turns = [{"role": "user", "content": content}]
        prompt = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return self.expanded(self.leading(prompt) + self.tokenizer(prompt, add_special_tokens=False)["input_ids"], sources)[0]

    def leading(self, text: str) -> list[int]:
        """The beginning-of-sequence token, where the tokenizer puts one in front and the text has none."""
        bos, word = self.tokenizer.bos_token_id, self.tokenizer.bos_token
        first = self.tokenizer("")["input_ids"][:1]
        return [bos] if bos is not None and first == [bos] and not text.startswith(word) else []

    def inputs(self, rows: Sequence[Sequence[ImageSource]]) -> dict[str, torch.Tensor]:
        """What the model gets of the images of a batch: pixel_values, and what else its processor makes of them.

        Raises:
            UserError: one that cannot be read.
        """
        images: list[list[Image.Image]] = [[opened(source) for source in row] for row in rows if row]
        if not images:
            return {}
        words = [self.word * len(row) for row in images]
        inputs = self.processor(images=images, text=words, add_special_tokens=False, padding=True, return_tensors="pt")
        return {name: value for name, value in inputs.items() if name not in _TEXT}

    def types(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Which tokens (B, T) are an image's, under the names that the model wants."""
        if not self.type_names:
            return {}
        marks = torch.tensor([token for token in self.processor.image_token_ids if token is not None], device=ids.device)
        return dict.fromkeys(self.type_names, torch.isin(ids, marks).long())


def load_reader(name: str, trust_remote_code: bool = False):
    """What reads the examples of model `name`: its tokenizer, or the `ImageReader` of a model of images and text.

    Raises:
        UserError: it cannot be found or read.
    """
    if not reads_images(name, trust_remote_code):
        return load_tokenizer(name, trust_remote_code)
    return ImageReader(load_processor(name, trust_remote_code), name)
