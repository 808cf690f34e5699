"""Data sets of the field to Parquet rows for `trl sft`."""
