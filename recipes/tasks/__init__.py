"""Captioning and grounding on the quickstart's drawings: position needs more than class tokens."""
