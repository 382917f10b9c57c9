"""Pictures on demand: walls of checkpoints and strengths, and single pictures; a process of its own draws them."""
