"""`doratune serve`: one base model and its adapters behind OpenAI's chat and completion endpoints.

refusals.py   what a client gets that asks for something wrong, in OpenAI's shape
bodies.py     what a request may say, and what it asks for then
prompts.py    messages and texts → token ids, held against the limits
choosing.py   the next token of each row
words.py      text as its tokens come, held back where it may be a stop
memory.py     keys and values of rows that came at different times
batch.py      the rows that are being written, of all adapters together
engine.py     the thread that writes; what waits, what was given up
guard.py      who may ask: key, host, kind and size of a body
replies.py    OpenAI's answers and chunks
app.py        the endpoints
server.py     address, signals, limits of connections
"""
