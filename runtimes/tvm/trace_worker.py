"""Invents schedules with MetaSchedule, in a process of its own: it may crash, or take minutes.

    python -m isofold.runtimes.tvm.trace_worker

Stateless: what was measured before comes with the question, so that a search that was killed, or that has another
machine's results, goes on from what the database says. MetaSchedule's evolutionary search proposes: it samples and
mutates, and traces that were measured well are its parents; `trace_model.Kinship` says which offspring look best.
"""

from __future__ import annotations

import json
import logging
import sys
import types
from typing import Any

# Importing TVM's tensor intrinsics parses hundreds of TIR scripts, which takes up to a minute. No rule here uses one.
sys.modules.setdefault("tvm.s_tir.tensor_intrin", types.ModuleType("tvm.s_tir.tensor_intrin"))

import tvm  # noqa: E402
from tvm.s_tir import Schedule, Trace  # noqa: E402
from tvm.s_tir import meta_schedule as ms  # noqa: E402

from ..tuning.child import serve  # noqa: E402
from .schedule_traces import representative, text_of  # noqa: E402
from .trace_model import SLOWEST, Kinship  # noqa: E402

POPULATION, GENERATIONS, NEWCOMERS = 48, 3, 24
"""Size of a generation, number of generations, and how many of the first generation are random samples."""

SHARED = 48 << 10
"""Bytes of a block's shared memory on every GPU."""


def invent(question: dict[str, Any]) -> dict[str, Any]:
    """{traces: texts of schedules that were not measured yet}.

    question: function and target (JSON), sizes and size (of unknown ones), cores, measured `[[trace, time against the
    default's]]` (None: wrong, or it does not compile), count, seed.
    """
    function = representative(tvm.ir.load_json(question["function"]), question["sizes"], question["size"])
    target = with_cores(tvm.ir.load_json(question["target"]), question["cores"])
    kind = str(target.kind.name)
    module = tvm.IRModule({"main": function})
    database = ms.database.MemoryDatabase()
    workload = database.commit_workload(module)
    info = ms.arg_info.ArgInfo.from_prim_func(function)
    known = []
    for text, ratio in question["measured"]:
        sch = scheduled(text, module)
        if sch is not None:
            time = SLOWEST if ratio is None else ratio
            known.append((ms.MeasureCandidate(sch, info), time))
            database.commit_tuning_record(ms.database.TuningRecord(sch.trace, workload, [time], target, info))
    context = ms.TuneContext(
        module,
        target=target,
        space_generator=ms.space_generator.PostOrderApply(sch_rules=kind, postprocs=kind, mutator_probs=kind),
        search_strategy=ms.search_strategy.EvolutionarySearch(
            population_size=POPULATION,
            init_min_unmeasured=NEWCOMERS,
            genetic_num_iters=GENERATIONS,
        ),
        num_threads=1,
        rand_state=1 + question["seed"],
    )
    count, spaces = question["count"], context.generate_design_space()
    context.pre_tuning(1 << 20, count, spaces, database, Kinship(known, question["seed"]))
    candidates = context.generate_measure_candidates() or []
    seen = {text for text, _ in question["measured"]}
    texts = dict.fromkeys(text_of(candidate.sch.trace) for candidate in candidates)
    return {"traces": [text for text in texts if text not in seen][:count]}


def scheduled(text: str, module: tvm.IRModule) -> Schedule | None:
    """The module scheduled by a trace; None where the trace does not apply to it."""
    sch = Schedule(module)
    try:
        Trace.apply_json_to_schedule(json.loads(text), sch)
    except (RuntimeError, TypeError, ValueError):
        return None
    return sch


def with_cores(target: Any, cores: int) -> Any:
    """The target with what MetaSchedule's rules ask for: the number of processors, or a block's limits."""
    if target.kind.name != "llvm":
        limits = {
            "max_threads_per_block": 1024,
            "max_shared_memory_per_block": SHARED,
            "thread_warp_size": 32,
        }
        return tvm.target.Target({"kind": "cuda", "arch": str(target.attrs["arch"]), **limits})
    known = {name: _plain(value) for name, value in target.attrs.items()}
    return tvm.target.Target({"kind": "llvm", **known, "num-cores": cores})


def _plain(value: Any) -> Any:
    return value if isinstance(value, (str, int)) else [str(v) for v in value]


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    serve(invent)
