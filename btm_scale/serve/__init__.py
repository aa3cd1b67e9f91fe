"""Serve a forest over HTTP, with OpenAI's API."""
