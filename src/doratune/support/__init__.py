"""What every part needs: files, models, the machine, tables, text and YAML, settings that are declared and checked once.

absent.py        what a path is instead of the file or folder that is needed
files.py         files that are whole or absent
folders.py       folders that are one generation, the old one or the new one
durable.py       what both stand on: locked staging names, syncing, an exchange in one act
outputs.py       an output that is, holds or lies in an input is refused
processes.py     several processes of one launch: who writes, and who agrees
models.py        loading models and tokenizers
image_models.py   image models with a head for labels of one's own, their processors
image_heads/      the heads: a class for each image, a class for each pixel
shards.py        models of which each process loads its own part
own_models.py    classes of models that are ours
vl_bart.py       BART that reads visual features in front of its text
image_towers.py   image models as makers of features
image_text.py    models of images and text: processors, which part is which
pipelines.py     text-to-image pipelines of diffusers: their parts, what they are trained on
pipeline_shapes.py   the same without weights: configs, and networks on the meta device
devices.py       the device that a command computes on
allocator.py     what happens to memory that is freed
hub.py           whether a hub answers, asked once
model_folders.py   model folders of transformers and diffusers: class, modules, config
transformers4.py   what transformers 5 wrote, readable by transformers 4 as well
headers.py       names and shapes in the files a model came from
examples.py      an input for any model, from its config
packages.py      requirements of every extra, and what is installed of them
environment.py   machine, versions, commit, peak memory
progress.py      progress of long work
recipes.py       recipes that come with the package
tables.py        text tables: aligned, Markdown
text.py          UTF-8 text and its lines
yaml_text.py     YAML, counted before it is built
values.py        what a setting may be: range and choices, declared beside it
patterns.py      regular expressions that come to an end
fields.py        settings of one dataclass, offered by another
"""
