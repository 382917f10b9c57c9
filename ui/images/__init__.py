"""The Images page: a folder of images, its captions, and what would spoil a training."""
