"""What goes out with a file: its header, its card, a bundle of all, and the way to the Hub."""
