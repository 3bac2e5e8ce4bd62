"""The mmrec command line."""
