"""What every part needs: files, models, the machine, tables, text and YAML, settings that are declared and checked once.

files.py         files that are whole or absent
models.py        loading models and tokenizers
hub.py           whether a hub answers, asked once
environment.py   machine, versions, commit, peak memory
tables.py        text tables: aligned, Markdown
text.py          UTF-8 text and its lines
yaml_text.py     YAML, counted before it is built
values.py        what a setting may be: range and choices, declared beside it
patterns.py      regular expressions that come to an end
fields.py        settings of one dataclass, offered by another
"""
