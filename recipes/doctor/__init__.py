"""`lavin doctor`: what is wrong with this machine, or with a LaVIN folder, and what to do about it."""
