"""A server for one model, compatible with OpenAI's API."""
