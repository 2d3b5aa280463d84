"""`python -m shoal` is `shoal`; the launcher starts its workers so."""

from shoal.cli import main

main()
