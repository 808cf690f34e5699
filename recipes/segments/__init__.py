"""`lavin train-segments`: several runs of `lavin train` in a row, each on what the one before wrote."""
