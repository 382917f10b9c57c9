"""Tools for the files of any trainer: each reads LoRA files or whole models and writes another file."""
