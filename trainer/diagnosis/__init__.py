"""What is wrong with a LoRA file, whoever made it, what is in it, and what it does."""
