"""What every part needs: files, models, the machine, tables, settings that are declared once.

files.py         files that are whole or absent
models.py        loading models and tokenizers
environment.py   machine, versions, commit, peak memory
tables.py        text tables: aligned, Markdown
patterns.py      regular expressions that come to an end
fields.py        settings of one dataclass, offered by another
"""
