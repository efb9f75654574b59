"""The last passes of every target: Relax to instructions of TVM's virtual machine."""

from __future__ import annotations

from collections.abc import Sequence

import tvm
from tvm.relax import transform


def executable_pipeline(planned: Sequence[tvm.transform.Pass] = ()) -> tvm.transform.Pass:
    """From scheduled Relax to instructions; planned: passes between planning memory and allocating it."""
    return tvm.transform.Sequential(
        [
            transform.ToNonDataflow(),
            transform.RemovePurityChecking(),
            transform.CallTIRRewrite(),
            transform.StaticPlanBlockMemory(),
            *planned,
            transform.LowerAllocTensor(),
            transform.KillAfterLastUse(),
            transform.LowerRuntimeBuiltin(),
            transform.ComputePrimValue(),
            transform.VMShapeLower(),
            transform.AttachGlobalSymbol(),
        ]
    )
