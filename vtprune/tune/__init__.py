"""Search for the plan that keeps the most accuracy under a FLOPs, latency or accuracy constraint.

Importing this package is cheap: optuna, lmms-eval and matplotlib are loaded by the modules that need them.
"""

from __future__ import annotations
