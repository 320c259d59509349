"""From files that people have to token ids with a mask of what is trained on.

In reading order: sources, reading, formats, rows, splits, store; then template, contract, tokenizer, render, inspect.
"""
