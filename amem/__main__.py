"""`python -m amem` is the `amem` command."""

from __future__ import annotations

from amem.cli import main

main()
