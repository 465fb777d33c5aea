"""Set-up of the whole test run."""

from __future__ import annotations

import torch

# the models are so small that a second thread costs more than it computes, and pytest already runs two processes
torch.set_num_threads(1)
