"""The next token of text, with the loss on the answers: `data/` says what an answer is. Cost: tokenizing the data once."""

from __future__ import annotations

from ...data.settings import DataSettings
from ...support.fields import setting_names
from ..visual import VisualSettings
from . import HELD_OUT, Objective


class LanguageModeling(Objective):
    """Causal language models, and models of images and text."""

    reads = (
        *HELD_OUT, *setting_names(DataSettings), *setting_names(VisualSettings), "streaming", "mirror", "max_length", "too_long",
        "train_on_prompt", "packing", "sample_prompts", "sample_steps", "sample_tokens",
    )  # fmt: skip

    def processor(self):
        from ...data.image_reader import load_reader

        return load_reader(self.recipe.model, self.recipe.trust_remote_code)

    def examples(self, processor, say, counts):
        from ..examples import read_examples

        rows, eval_rows, self.kind = read_examples(self.recipe, processor, say, counts)
        return rows, eval_rows

    def load(self, dtype: str, quantize: str = "none", double_quantization: bool = False, blocks: dict[str, str] | None = None):
        from ...support.models import load_model

        r = self.recipe
        device = "cpu" if r.device == "cpu" else None  # else the Trainer puts it on its process's card
        return load_model(r.model, dtype, quantize, double_quantization, r.trust_remote_code, device, blocks)

    def skeleton(self):
        from ...support.shards import skeleton_of

        return skeleton_of(self.recipe.model, self.recipe.trust_remote_code)

    def compare(self, model, processor, rows, eval_rows) -> list[str]:
        from ...data.limits import check_tokens
        from ..examples import first_rows

        return check_tokens(model, processor, (row["input_ids"] for row in [*first_rows(rows), *eval_rows]))

    def arranged(self, rows, model, processor, say):
        from ..packing import packed_rows

        return packed_rows(rows, self.recipe, self.collator(model, processor), model, say) if self.recipe.packing else rows

    def collator(self, model, processor):
        from ..examples import collator

        return collator(self.recipe, processor, model)

    def watchers(self, processor, say, checkpoint) -> list:
        from ..samples import SampleWriter

        return [SampleWriter(self.recipe, self.kind, processor, say, checkpoint)] if self.recipe.sample_prompts else []

    def arguments(self) -> dict:
        by_length = self.recipe.group_by_length and not (self.recipe.packing or self.recipe.streaming)
        return {
            "train_sampling_strategy": "group_by_length" if by_length else "random",
            "length_column_name": "length",
            "include_num_input_tokens_seen": "non_padding",
            "dataloader_num_workers": 0 if self.recipe.streaming else self.recipe.workers,
        }


OBJECTIVE = LanguageModeling
