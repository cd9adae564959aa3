"""Parquet -> models: one task a file, and the engine that trains them."""
