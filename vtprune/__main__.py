"""`python -m vtprune` is the `vtprune` command."""

from __future__ import annotations

from vtprune.cli import main

main()
