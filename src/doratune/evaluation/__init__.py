"""Scoring a model on the commonsense tasks (§5.1): one file a protocol, one for the tasks, one for the report."""
