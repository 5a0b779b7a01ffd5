"""The demonstration: a commonsense set of our own, and the run that fine-tunes, scores and merges a real model with it.

demonstration.py   the run: score, train, score again, merge, report
settings.py        what it can be told
demo.yaml          its recipe
"""
