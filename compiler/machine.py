"""The rates of this machine for the cost model: measured once (`isofold machine`), kept in the cache folder.

A file there is named after the threads and a hash of processor, versions and formats, so that a change of any of
them asks for a new measurement. A machine that was never measured is taken to be like the one in `data/machine*.json`
that has its processor, else like that in `data/machine.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from .artefact import replacing
from .cost_model import Machine
from .processor import cache_folder, processor
from .recipe import PRESETS, Recipe

Say = Callable[[str], None]

_DATA = Path(__file__).parent / "data"
_SHIPPED = _DATA / "machine.json"


def machine(threads: int | None = None, *, refresh: bool = False, progress: Say | None = None) -> Machine:
    """The machine's rates with `threads` (default: all cores): from the cache, else measured (under a minute).

    refresh: measure even if the cache has them. Raises IsofoldError where the op library cannot be built.
    """
    from .measure_machine import measured

    count = threads or len(os.sched_getaffinity(0))
    found = None if refresh else _cached(count)
    if found is None:
        found = measured(processor(), count, progress or (lambda _: None))
        path = cache_folder() / _file_name(count)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(json.dumps(found.to_json(), indent=1).encode())
    return found


def known_machine(threads: int | None = None) -> tuple[Machine, bool]:
    """Rates without measuring anything, and whether they are this machine's own."""
    found = _cached(threads or len(os.sched_getaffinity(0)))
    return (_shipped(), False) if found is None else (found, True)


def _shipped() -> Machine:
    machines = [
        Machine.from_json(json.loads(path.read_text())) for path in sorted(_DATA.glob("machine*.json"))
    ]
    here = processor()
    same = next((machine for machine in machines if machine.name == here), None)
    return same or Machine.from_json(json.loads(_SHIPPED.read_text()))


def measured_at() -> int:
    """When a machine was last measured into the cache folder, nanoseconds; 0: never."""
    return max((path.stat().st_mtime_ns for path in cache_folder().glob("machine-*.json")), default=0)


def _cached(threads: int) -> Machine | None:
    path = cache_folder() / _file_name(threads)
    return Machine.from_json(json.loads(path.read_text())) if path.exists() else None


def _file_name(threads: int) -> str:
    packages = [f"{name} {version(name)}" for name in ("isofold", "onnxruntime")]
    forced = [os.environ["ISOFOLD_ISA"]] if os.environ.get("ISOFOLD_ISA") else []
    facts = json.dumps([processor(), threads, *packages, sorted(linear_formats()), "sparse", *forced])
    return f"machine-{threads}-{hashlib.sha256(facts.encode()).hexdigest()[:12]}.json"


def linear_formats() -> dict[str, Recipe]:
    """One recipe for each way that presets store and read linears, by its text.

    Not those with sparsity: what a zero saves depends on how many there are, which `passes.extract_sparsity` knows.
    """
    found: dict[str, Recipe] = {}
    for preset in PRESETS.values():
        plain = preset.model_copy(
            update={"fold": None, "kv": None, "embeddings": None, "convolutions": None, "layers": []}
        )
        chosen_by_rates = plain.weights is not None and plain.weights.format == "auto"
        if plain.activations.mode != "static" and not chosen_by_rates and plain.sparsity is None:
            found.setdefault(json.dumps(plain.model_dump(mode="json", exclude={"name"})), plain)
    return found
