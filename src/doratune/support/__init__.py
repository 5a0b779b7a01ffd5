"""What every part needs: files, models, the machine, tables, settings that are declared once.

files.py         files that are whole or absent
folders.py       folders that are one generation, the old one or the new one
durable.py       what both stand on: locked staging names, syncing, an exchange in one act
outputs.py       an output that is, holds or lies in an input is refused
processes.py     several processes of one launch: who writes, and who agrees
models.py        loading models and tokenizers
environment.py   machine, versions, commit, peak memory
tables.py        text tables: aligned, Markdown
fields.py        settings of one dataclass, offered by another
"""
