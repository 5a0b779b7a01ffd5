"""What every part needs: files, models, the machine, tables, settings that are declared once.

files.py         files that are whole or absent
models.py        loading models and tokenizers
model_folders.py     model folders of transformers and diffusers: class, modules, config
headers.py       names and shapes in the files a model came from
examples.py      an input for any model, from its config
environment.py   machine, versions, commit, peak memory
tables.py        text tables: aligned, Markdown
fields.py        settings of one dataclass, offered by another
"""
