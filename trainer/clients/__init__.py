"""What each client makes of a LoRA file: `table` says it of kinds of files, the other modules of one file."""
