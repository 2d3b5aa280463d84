"""Run `shoal` as `python -m shoal`, which is how the launcher starts its workers."""

from shoal.cli import main

main()
