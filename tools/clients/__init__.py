"""Do real clients make of our files what the live model does? `python -m tools.clients` sets them up and asks them.

bases     small models with the layers of the published ones, and what is asked of them
cases     files of every kind in every format, written by the exporter, and what the live model answers
places    environments of their own, in which clients are installed
runners   scripts that run there
asked     the clients, and what each is expected to make of a file
drawn     stable-diffusion.cpp, which takes full-size checkpoints and gives pictures
verdicts  how near each client came, and the table
"""
