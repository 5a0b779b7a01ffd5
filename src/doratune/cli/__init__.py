"""The command line: one file a command, imported when it is called.

main.py        the table of commands; errors and signals as exit statuses
__main__.py    python -m doratune.cli
description.py   what a command can be told, without running it
arguments.py   options of a command from a dataclass
other_names.py   what other programs call settings that are here
inputs.py      inputs that are not there, all in one line
output.py      lines, the last line in JSON, progress bars
init.py        doratune init: a recipe that fits model, data and memory
data.py        doratune data: what a model sees of a data set
plan.py        the memory of a training run before it runs
train.py       doratune train: one run of a recipe
following.py   what can be run on a finished run of training
runs.py        doratune runs: the runs in a folder
demo.py        doratune demo: what make demo runs
evaluate.py    doratune evaluate: score a model on tasks
mt_bench.py    doratune evaluate --task mt_bench: answers and a judge
merge.py       doratune merge: base + adapter → a model folder
convert.py     doratune convert: an adapter into another program's format
export.py      doratune export: GGUF and other forms for engines without DoRA
extract.py     doratune extract: an adapter out of a fully fine-tuned model
generate.py    doratune generate: answers to many prompts, as JSON lines
chat.py        doratune chat: a conversation in the terminal
push.py        doratune push: a result to a model hub
serve.py       doratune serve: OpenAI's endpoints over a model and its adapters
repeated.py    a flag that is given more than once
compare.py     doratune compare: a grid of training runs
inspect.py     doratune inspect: what an adapter adapts
analyze.py     doratune analyze: ΔM and ΔD, spectra, gradients
report.py      doratune report: one HTML page about runs
doctor.py      doratune doctor: faults of the environment
completion.py   doratune completion: for the Tab key of a shell
bench.py       doratune bench: speed and memory
"""
