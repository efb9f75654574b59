"""Peers: install what the benchmarks compare with, each into a virtual environment of its own.

    python benchmarks/peers.py list
    python benchmarks/peers.py install openvino
    python benchmarks/peers.py python openvino      # path of its interpreter

Peers are benchmark-only: the package and its tests never import them, and two peers may pin versions that
exclude each other. The environments live under ``$ISOFOLD_CACHE/peers`` (default ``~/.cache/isofold/peers``).
A finished installation leaves a stamp with what was asked for; the same request again does nothing, another
request, or a cut-off installation, starts afresh.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# Every peer resolves against the torch that isofold itself is measured with, so that none drags in another
# one.
CONSTRAINTS = ("torch==2.13.0",)


@dataclass(frozen=True)
class Peer:
    """What pip is asked for, and the statement that proves that the installation works."""

    requirements: tuple[str, ...]
    check: str
    about: str


PEERS: dict[str, Peer] = {
    "onnxruntime": Peer(
        ("onnxruntime==1.32.0", "onnx==1.23.2", "numpy"),
        "import onnxruntime, onnx",
        "plain ONNX Runtime, with nothing else beside it",
    ),
    "openvino": Peer(
        ("openvino==2026.4.0", "nncf", "onnx==1.23.2", "numpy"),
        "import openvino, nncf",
        "OpenVINO and NNCF post-training quantization",
    ),
}


class PeerError(RuntimeError):
    """A peer is unknown, not installed, or did not install."""


def cache_folder() -> Path:
    """The folder for everything the benchmarks download, build or generate; created when missing."""
    root = os.environ.get("ISOFOLD_CACHE")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(root).expanduser() if root else home / "isofold"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def lookup(name: str) -> Peer:
    """The peer of that name; PeerError lists the known ones."""
    if name not in PEERS:
        raise PeerError(f"unknown peer {name!r}; known: {', '.join(sorted(PEERS))}")
    return PEERS[name]


def _stamp(peer: Peer) -> str:
    wanted = {
        "requirements": list(peer.requirements),
        "constraints": list(CONSTRAINTS),
        "python": list(sys.version_info[:2]),
    }
    return json.dumps(wanted, indent=1)


def interpreter(name: str) -> Path | None:
    """The peer's interpreter when this very request is installed, else None."""
    peer = lookup(name)
    folder = cache_folder() / "peers" / name
    stamp = folder / "installed.json"
    python = folder / "bin" / "python"
    if python.exists() and stamp.exists() and stamp.read_text() == _stamp(peer):
        return python
    return None


def require(name: str) -> Path:
    """The peer's interpreter; PeerError says how to install it."""
    python = interpreter(name)
    if python is None:
        raise PeerError(f"peer {name!r} is not installed: run `python benchmarks/peers.py install {name}`")
    return python


def _run(command: list[str], log: Path, what: str) -> None:
    with log.open("a") as stream:
        stream.write(f"$ {' '.join(command)}\n")
        stream.flush()
        code = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
        raise PeerError(f"{what} failed with exit code {code}; last lines of {log}:\n{tail}")


def install(name: str) -> Path:
    """Install one peer and return its interpreter. PeerError shows the end of pip's log."""
    peer = lookup(name)
    python = interpreter(name)
    if python is not None:
        print(f"{name}: already installed at {python}")
        return python
    folder = cache_folder() / "peers" / name
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    log = folder / "install.log"
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(CONSTRAINTS) + "\n")
    print(f"{name}: installing {' '.join(peer.requirements)} into {folder} (log: {log})", flush=True)
    _run([sys.executable, "-m", "venv", str(folder)], log, f"{name}: making the virtual environment")
    python = folder / "bin" / "python"
    _run(
        [str(python), "-m", "pip", "install", "-c", str(constraints), *peer.requirements],
        log,
        f"{name}: pip install",
    )
    _run([str(python), "-c", peer.check], log, f"{name}: the check `{peer.check}`")
    # The stamp comes last and by renaming: without it the next call starts afresh.
    stamp = folder / "installed.json"
    beside = stamp.with_suffix(".tmp")
    beside.write_text(_stamp(peer))
    beside.replace(stamp)
    print(f"{name}: installed, {python}")
    return python


def main() -> int:
    """Command line; exit code 1 and one message where a peer is unknown or does not install."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the known peers and whether they are installed")
    for command in ("install", "python"):
        sub = commands.add_parser(command)
        sub.add_argument("name", nargs="+" if command == "install" else None)
    arguments = parser.parse_args()
    try:
        if arguments.command == "list":
            for name, peer in PEERS.items():
                print(f"{name:12} {'installed' if interpreter(name) else '-':10} {peer.about}")
        elif arguments.command == "install":
            for name in arguments.name:
                install(name)
        else:
            print(require(arguments.name))
    except PeerError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
