"""`python -m mmalign`: the command line."""

from mmalign.cli import main

main()
