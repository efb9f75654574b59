"""Names of the layouts of sparse matrices (`sparse_packing`), and which values each holds."""

from __future__ import annotations

LAYOUTS = ("bitmask", "panels", "windows", "1:4", "2:4", "4:8", "1x4", "16x1", "16x4")
"""In the order of `enum isofold_sparse_layout` (runtimes/kernels/sparse_driver.h)."""

VALUES = ("float32", "bfloat16", "int8", "int4")
"""In the order of `enum isofold_sparse_value`."""

HELD = {
    "bitmask": VALUES,
    "panels": ("int4",),
    "windows": ("int8",),
    "1:4": ("int8",),
    "2:4": ("int8",),
    "4:8": ("int8",),
    "1x4": ("int8",),
    "16x1": ("float32", "bfloat16"),
    "16x4": ("int8",),
}
"""Values by layout."""
