"""How fast and how lean training is here: the real trainer, alone, or side by side with a plain loop or with itself."""
