"""Scoring a model on tasks whose answers can be checked (§5.1, §6.1): one file a protocol, one a kind of items.

evaluate.py     one evaluation: model × tasks × protocols
own_items.py    items of a user's own task, in the formats of training data
metrics.py      exact match, F1, ROUGE, JSON, a pattern, a function of one's own
tasks.py        tasks by name or file, chance and majority level
kinds/          what an item asks and when its answer is right: commonsense, arithmetic, Orca-Math
numbers.py      numbers in a text
protocols.py    the protocols' names
generate.py     protocol generate: the model writes
likelihood.py   protocol likelihood: the most probable allowed answer
paper.py        protocol paper: the published evaluation replayed
prefix.py       beams of one prompt share its keys and values
published.py    published accuracies
summary.py      from item records to figures and a table
"""
