"""`python -m tokencomp.cli`."""

from tokencomp.cli import main

main()
