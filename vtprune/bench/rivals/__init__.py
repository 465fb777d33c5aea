"""What a user could pick instead: other libraries, timed in the same run on the same prompt and budgets.

None of them is a dependency: each is imported when it is asked for, and skipped with the reason where it cannot run.
Nothing of theirs is proved: the masked oracle is not asked, and what they keep is their own affair.
"""

from __future__ import annotations

from vtprune.bench.rivals import angelslim, kvpress, sparsevlm
from vtprune.bench.rivals.base import Rival
from vtprune.bench.rivals.rows import rival_rows

__all__ = ["RIVALS", "Rival", "rival_rows"]

RIVALS: dict[str, Rival] = {entry.name: entry for entry in (kvpress.RIVAL, sparsevlm.RIVAL, angelslim.RIVAL)}
