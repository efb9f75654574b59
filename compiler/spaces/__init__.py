"""Channel spaces: which parameters must change basis together, by which maps, and how a change is applied.

`analyse(program)` finds them in a canonical program; see docs/spaces.md.
"""

from __future__ import annotations

from .analysis import Gain, Member, Space, Spaces, analyse
from .atoms import Group, Reason

__all__ = ["Gain", "Group", "Member", "Reason", "Space", "Spaces", "analyse"]
