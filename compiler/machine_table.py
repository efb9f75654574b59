"""`isofold machine` on the terminal."""

from __future__ import annotations

from .console import show, show_table
from .cost_model import Machine
from .html_report import format_bytes


def show_machine(machine: Machine) -> None:
    """Bandwidth by working set, and the rate of every kind of linear."""
    show(f"{machine.name}, {machine.threads} threads; a node costs {1e6 * machine.overhead:.1f} µs by itself")
    show_table(
        [">working set", ">read"],
        [[format_bytes(int(size)), f"{rate / 1e9:.1f} GB/s"] for size, rate in machine.bandwidth],
    )
    rows = sorted({int(count) for curve in machine.paces.values() for count, _ in curve})
    shown = []
    for kind, curve in machine.paces.items():
        paces = {int(count): pace for count, pace in curve}
        # Two operations for each weight and row.
        shown.append([kind, *(f"{2e-9 * r / paces[r]:.0f}" if r in paces else "" for r in rows)])
    show_table(["weights in the cache, GOPS at", *(f">{r} row{'s' if r > 1 else ''}" for r in rows)], shown)
