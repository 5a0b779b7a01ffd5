"""Scoring a model on tasks whose answers can be checked (§5.1, §6.1): one file a protocol, one a kind of items.

evaluate.py     one evaluation: model × tasks × protocols
own_items.py    items of a user's own task, in the formats of training data
harness.py      tasks of lm-eval by name
captions.py     CIDEr
seen.py         what was written about images and video, by the tasks' published rules
metrics.py      exact match, F1, ROUGE, JSON, a pattern, a function of one's own
tasks.py        tasks by name or file, chance and majority level
kinds/          what an item asks and when its answer is right: commonsense, arithmetic, Orca-Math, questions about images
scorers/        models that are no language models: classes of images, of pixels
benchmarks/     published benchmarks of questions about images: their files, their answer files
answers.py      the score of an answer file
numbers.py      numbers in a text
vqa.py          soft accuracy of answers by several people
protocols.py    the protocols' names
generate.py     protocol generate: the model writes
images.py       the images of items, in their prompts and as the model's inputs
likelihood.py   protocol likelihood: the most probable allowed answer
paper.py        protocol paper: the published evaluation replayed
shrinking.py    rows of a batch that have ended leave it
prefix.py       beams of one prompt share its keys and values
published.py    published accuracies
summary.py      from item records to figures and a table
"""
