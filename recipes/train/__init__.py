"""`lavin train`: checks, then unmodified `trl sft`."""
