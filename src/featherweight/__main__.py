"""`python -m featherweight` is the command line too."""

from .cli import main

main()
