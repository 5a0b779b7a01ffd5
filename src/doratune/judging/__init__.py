"""MT-Bench (§5.4): answers of two turns, judged by a model behind an OpenAI-compatible address.

questions.py     the published questions, references and judge prompts
answers.py       a model's answers to both turns, kept as they come
cases.py         what the judge is asked: one answer at a time, or two runs against each other
verdicts.py      ratings and winners in what the judge says
client.py        calls of the judge: retried, in parallel, stopped by one line
ledger.py        judgments on disk: what was paid for is never asked again
figures.py       means by category and turn, wins, intervals
evaluation.py    one evaluation: answers → calls → figures
"""
