"""LaVIN in other people's evaluation harnesses."""
