"""The chat page, the OpenAI-compatible API, and a load test for it."""
