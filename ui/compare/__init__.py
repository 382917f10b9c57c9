"""The Compare page: a wall of checkpoints by strengths, two pictures side by side, and a playground."""
