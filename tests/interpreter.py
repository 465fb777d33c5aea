"""Turns Triton's interpreter on where there is no GPU, so that tests run its kernels there. With one they run compiled.

Triton reads the flag when it meets a decorated function, its own library's too. So this is imported before all that may
import Triton: transformers does, and vtprune's engine with it.
"""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
