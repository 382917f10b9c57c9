"""`make lock`: the files in requirements/, from which every install of ours takes its packages.

constraints.txt says which version of what, and is written by hand. uv finds what is needed of it, for all systems and
Pythons at once, and the hash of every file; pip then installs nothing whose hash is another. `tests/test_lock.py` holds
the files in step.
"""
