"""`python -m tokencomp`, the same as the command `tokencomp`."""

from tokencomp.cli import main

main()
