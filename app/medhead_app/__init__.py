"""The chat page and the OpenAI-compatible API."""
