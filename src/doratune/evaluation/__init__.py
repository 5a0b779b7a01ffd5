"""Scoring a model on the commonsense tasks (§5.1): one file a protocol, one for the tasks, one for the report.

evaluate.py     one evaluation: model × tasks × protocols
tasks.py        the tasks: which answers each allows
protocols.py    the protocols' names
generate.py     protocol generate: the model writes
likelihood.py   protocol likelihood: the most probable allowed answer
paper.py        protocol paper: the published evaluation replayed
prefix.py       beams of one prompt share its keys and values
published.py    published accuracies
summary.py      from item records to figures and a table
"""
