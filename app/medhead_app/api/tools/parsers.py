"""The names of the formats of tool calls, as in vLLM."""

PARSERS = ("hermes", "llama3_json", "mistral", "pythonic", "qwen3_coder")
