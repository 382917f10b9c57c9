"""Which checkpoint, which strength: three scores for every cell of a wall, and the one cell they recommend."""
