"""What an adapted layer is composed of: plain objects, so that they add nothing to module paths and state dicts."""

from __future__ import annotations

import copy
from typing import Any, Self


class Part:
    """A part of one layer. It reaches the layer's tensors through the layer, since frameworks replace them."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def of(self, replica: Any) -> Self:
        """The same part of a shallow copy of the layer."""
        twin = copy.copy(self)
        twin.layer = replica
        return twin
