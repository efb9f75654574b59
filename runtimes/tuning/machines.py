"""The machines that candidates are measured on: this one, or servers that a TVM tracker lends."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np

from ...compiler.errors import InputError, ToolchainError
from .child import Child, LostError
from .workloads import Workload

__all__ = ["Comparison", "Facts", "Machine", "Tracker", "compared"]

_WORKER = "isofold.runtimes.tuning.worker"
START, TURNS = 120.0, 120.0
"""Seconds to wait for a machine (imports, a tracker's queue) and for one comparison."""

_DRAWS, _QUANTILE = 200, 0.25


@dataclass(frozen=True)
class Facts:
    """What a machine is. cache: bytes of the last level."""

    processor: str
    host: str
    isa: str
    cores: int
    cache: int


@dataclass(frozen=True)
class Comparison:
    """One candidate on one workload against the defaults in the same rounds; see database.Record."""

    seconds: float
    baseline: float
    ratio: float
    noise: float


@dataclass(frozen=True)
class Tracker:
    """`HOST:PORT` of a TVM tracker, and the key that servers have registered under.

    Raises:
        InputError: the address is none, nothing answers there, or no server has the key.
        ToolchainError: TVM's RPC cannot be used here.
    """

    host: str
    port: int
    key: str

    @staticmethod
    def at(address: str, key: str) -> Tracker:
        """Parse and check the address; says what is wrong with it."""
        host, _, port = address.rpartition(":")
        where = f"--rpc {address}"
        if not host or not port.isdigit() or not 0 < int(port) < 65536:
            raise InputError(
                "This is no address of a tracker", where=where, expected="HOST:PORT, such as tuner:9190"
            )
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError as error:
            hint = "start one there: python -m tvm.exec.rpc_tracker --host 0.0.0.0 --port 9190"
            raise InputError("No tracker answers", where=where, got=str(error), hint=hint) from None
        tracker = Tracker(host, int(port), key)
        if not tracker.servers():
            serve = f"python -m tvm.exec.rpc_server --tracker {address} --key {key}"
            raise InputError(
                "No server is registered under this key",
                where=f"{where} --key {key}",
                expected="one or more servers",
                hint=f"run this on every machine that shall measure: {serve}",
            )
        return tracker

    def servers(self) -> int:
        """How many servers have the key now, lent or not. Raises InputError where the tracker does not answer."""
        if util.find_spec("tvm") is None:
            raise ToolchainError("Tuning through RPC needs TVM", hint="pip install apache-tvm==0.27.0.post1")
        from tvm import rpc

        try:
            session = rpc.connect_tracker(self.host, self.port)
            known = session.summary()["server_info"]
            session.close()
        except (OSError, RuntimeError, ValueError) as error:
            address = f"{self.host}:{self.port}"
            raise InputError("This is no TVM tracker, or it hung up", where=address, got=str(error)) from None
        return sum(entry["key"] == f"server:{self.key}" for entry in known)


class Machine:
    """One machine to measure on: this one, or the next free server of a tracker. Any call may raise LostError.

    worker: the module that the process behind it runs.
    """

    def __init__(self, tracker: Tracker | None = None, worker: str = _WORKER) -> None:
        where = [] if tracker is None else [tracker.host, str(tracker.port), tracker.key]
        self._child = Child(worker, where)

    def facts(self, library: Path) -> Facts:
        """What it is; library: any candidate."""
        answer = self.ask({"do": "machine", "libraries": [str(library)]}, START)
        cores, cache = int(answer["cores"]), int(answer["cache"])
        return Facts(answer["processor"], answer["host"], answer["isa"], cores, cache or 32 << 20)

    def compare(
        self, libraries: Sequence[Path], workload: Workload, facts: Facts, isa: str, rounds: int, exact: bool
    ) -> list[Comparison | str]:
        """Candidates against the defaults, of which libraries[0] and [1] are two copies; a text for a wrong one."""
        question = {
            "do": "compare",
            "libraries": [str(path) for path in libraries],
            "workload": workload.to_json(),
            "isa": isa,
            "cache": facts.cache,
            "rounds": rounds,
            "exact": exact,
        }
        return compared(self.ask(question, TURNS))

    def ask(self, question: dict[str, Any], timeout: float) -> dict[str, Any]:
        """The worker's answer."""
        answer = self._child.ask(question, timeout)
        if "error" in answer:
            raise LostError(answer["error"])
        return answer

    def close(self) -> None:
        """End the process; a server goes back to its tracker."""
        self._child.close()


def compared(answer: dict[str, Any]) -> list[Comparison | str]:
    """Times, ratios and their noise, from a worker's answer.

    A time is the lower quartile over the rounds: what else runs on a machine only ever adds, in bursts, while a minimum
    would be one lucky round. All libraries see the same rounds, so that drifts cancel in the ratio. Its noise is its
    standard deviation when whole rounds are drawn anew with replacement (bootstrap), and at least what two copies of
    the defaults differ by.
    """
    wrong = answer["wrong"]
    good = [i for i, text in enumerate(wrong) if text is None]
    times = np.array([answer["seconds"][i] for i in good])
    rounds = times.shape[1]
    drawn = np.random.default_rng(0).integers(0, rounds, (_DRAWS, rounds))
    again = np.quantile(times[:, drawn], _QUANTILE, axis=2)  # [libraries, draws]
    whole = np.quantile(times, _QUANTILE, axis=1)
    base, bases = (whole[0] + whole[1]) / 2, (again[0] + again[1]) / 2
    twins = abs(whole[0] - whole[1]) / base
    found: list[Comparison | str] = []
    for i in range(2, len(wrong)):
        text = wrong[i]
        if text is not None:
            found.append(text)
            continue
        at = good.index(i)
        noise = max(float(np.std(again[at] / bases)), float(twins))
        found.append(Comparison(float(whole[at]), float(base), float(whole[at] / base), noise))
    return found
