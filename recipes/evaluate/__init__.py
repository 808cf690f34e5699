"""Asks a LaVIN the questions of a benchmark and scores the answers."""
