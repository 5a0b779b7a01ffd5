"""Training data: where it comes from, what its items are, what a model sees of them; one file a format and a container.

sources.py             files, folders, hub ids, published names
files.py               the items of a file, each with its place
containers/            .json, .jsonl, .csv, .tsv, .parquet, .arrow, compressed or not
formats/               instruction, chat, sharegpt, completion, questions, text, preference
documents.py           published files of JSON: lists and values, held against what they should be
visual_tasks/          questions about images and video, captions: published files, one's own
visual_features/       what they look at, as features of an image tower, in one file
image_sets/            labelled images: folders by class, tables of paths and labels, .npz
mask_sets.py           images with masks: two folders, a table of paths
masks.py               one mask: the class number of each pixel
settings.py            how items are read and what is learned
loading.py             items of one or several sources, checked
conversation.py        conversations in one form: roles, tool calls, order
chat.py                conversations by the tokenizer's template
instruction.py         the Alpaca prompt
words.py               special tokens that an item's words spell
published.py           the paper's data sets by name
published_prompts.py   the published scripts' prompts, to replay them
facts.py               the demonstration's facts
image_sources.py       which images an item names, and where they are
image_reader.py        a processor with the face of a tokenizer: where images go into the tokens
image_batches.py       batches with the images of their rows
images.py              one image: RGB, upright, or one line that says why not
packing.py             several examples in one row, none of which sees another
encode.py              answer and prompt, the length limit, batches
survey.py              a whole data set: lengths, what is cut, wrong, odd, double
leakage.py             training items that a test set asks too
visible.py             an example for the eye, its learned part marked
limits.py              tokens and lengths against what a model has
"""

from __future__ import annotations

from .loading import encoder, load_items, preference_pairs, recognition
from .settings import DataSettings
from .sources import DEMO

__all__ = ["DEMO", "DataSettings", "encoder", "load_items", "preference_pairs", "recognition"]
