"""What days of work bring: long logs, a long queue, many browsers, many checkpoints."""
