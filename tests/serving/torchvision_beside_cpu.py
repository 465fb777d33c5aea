"""Loaded at start-up by a .pth file: the published torchvision is built for GPUs, and beside a CPU torch its own
operators are missing. Transforms in Python need none, but two shape rules are registered for operators by name; so the
names are declared before torchvision is imported."""

import sys
from importlib.abc import MetaPathFinder

_BOXES = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class _BeforeTorchvision(MetaPathFinder):
    """Finds nothing itself."""

    def __init__(self):
        self.declared = None

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and self.declared is None:
            import torch

            # declarations last as long as this object
            self.declared = torch.library.Library("torchvision", "DEF")
            if not torch.version.cuda:
                for operator in ("nms", "qnms"):
                    self.declared.define(operator + _BOXES)
        return None


sys.meta_path.insert(0, _BeforeTorchvision())
