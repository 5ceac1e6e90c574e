"""sandbox.py's launcher, a program of its own: see __main__.py."""
