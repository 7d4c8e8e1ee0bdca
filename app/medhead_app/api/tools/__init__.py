"""Function tools: their definitions, the text in which a model calls them, and the grammar of that text.

`reader.py` reads a text character by character, so its result does not depend on how the text is split; `hermes.py`,
`llama3.py`, `mistral.py`, `pythonic.py` and `qwen3_coder.py` hold one format each, `formats.py` chooses one, `grammar.py`
writes the grammar of the calls.
"""
