"""`lavin serve`: OpenAI-compatible chat completions with images, many requests in one batch."""
