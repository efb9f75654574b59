"""ONNX models of many equal linears, for linears.py: one float input, one output per layer, weights beyond
the L3.

Every layer has weights of its own and quantizes its own activations inside its operator, as ONNX Runtime's do; in
one kind all layers read one separate quantizer. The graph optimizer is off while measuring. All quantized kinds of
one shape use the same codes and scales, so their outputs can be compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from isofold.compiler.whole_pages import WholePagesWriter

PAGE = 4096
SEED = 7


@dataclass(frozen=True)
class Kind:
    """One way to compute a linear: its name in the table and what it is made of."""

    name: str
    operator: str
    bits: int
    group: int = 0
    accuracy: int = 0
    float_activations: bool = False
    shared_quantizer: bool = False
    zero: bool = False
    format: str = ""
    """Of linear_coded, or codebooks such as 2x8; empty: integers."""
    outliers: float = 0.0
    """Share of each row that is kept beside integers in float16."""
    rank: int = 0
    """Of a thin part beside them (LoRC): a factor of 8 bits and one of floats."""
    fp8_activations: bool = False
    """Codes of small floats meet activations of E4M3, in one quantizer for all layers, instead of floats."""
    hadamard: bool = False
    """The layer's own quantizer turns its input by a Hadamard matrix first."""

    @property
    def ours(self) -> bool:
        return self.operator == "isofold"


class ExternalData:
    """A file of raw tensors next to a model, each at a page boundary, and the initializers that point into
    it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stream = WholePagesWriter(path.open("wb", buffering=0))
        self.initializers: list[TensorProto] = []
        self.tensor_bytes = 0

    def add(self, name: str, array: NDArray[np.generic]) -> str:
        """Append one tensor; returns its name."""
        self.stream.write(b"\0" * (-self.stream.tell() % PAGE))
        offset = self.stream.tell()
        self.stream.write(np.ascontiguousarray(array).tobytes())
        tensor = TensorProto(
            name=name, data_type=helper.np_dtype_to_tensor_dtype(array.dtype), dims=array.shape
        )
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self.path.name), ("offset", offset), ("length", array.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)
        self.tensor_bytes += array.nbytes
        return name


def codes_and_scales(
    n: int, k: int, bits: int, group: int, layer: int
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Codes `[N, K]` and scales `[N, G]` of a layer; scales are float16 values, codes about normal.

    Layers are rotations of one drawn matrix: different bytes in different memory, without drawing each anew.
    """
    generator = np.random.default_rng([SEED, n, k, bits, group])
    limit = (1 << (bits - 1)) - 1
    drawn = generator.standard_normal((n, k), np.float32) * max(limit / 3, 1)
    codes = np.clip(np.rint(drawn), -limit - (bits < 8), limit).astype(np.int8)
    groups = k // group if group else 1
    spread = 3 / limit / np.sqrt(k)
    scales = (spread * generator.uniform(0.5, 1.0, (n, groups))).astype(np.float16).astype(np.float32)
    return np.roll(codes, layer, 0), np.roll(scales, layer, 0)


def zero_points(kind: Kind, n: int, k: int, layer: int) -> NDArray[np.float32] | None:
    """Zero points `[N, G]` of a layer in codes, such as the format stores them; None where the kind has none."""
    if not kind.zero:
        return None
    generator = np.random.default_rng([SEED, n, k, kind.bits, kind.group, 1])
    steps = 16 if kind.bits < 4 else 1
    drawn = generator.integers(-steps, steps + 1, (n, k // kind.group)) / steps
    return np.roll(drawn.astype(np.float32), layer, 0)


def outliers(kind: Kind, n: int, k: int, layer: int) -> tuple[NDArray[np.int64], NDArray[np.float16]]:
    """Places and values `[N, J]` of the outliers of a layer."""
    generator = np.random.default_rng([SEED, n, k, 2])
    each = round(kind.outliers * k)
    places = generator.permuted(np.tile(np.arange(k), (64, 1)), axis=1)[:, :each]
    values = (generator.standard_normal((64, each)) * 4 / np.sqrt(k)).astype(np.float16)
    index = (np.arange(n) + layer) % 64
    return places[index], values[index]


def thin_part(
    kind: Kind, n: int, k: int, layer: int
) -> tuple[tuple[NDArray[np.int8], NDArray[np.float32]], NDArray[np.float32]]:
    """The two factors of a layer: codes `[r, K]` with scales `[r, 1]`, and `[r, N]`."""
    generator = np.random.default_rng([SEED, n, k, kind.rank, 3])
    codes = generator.integers(-127, 128, (kind.rank, k), np.int8)
    scale = np.full((kind.rank, 1), 1 / 64 / k, np.float32)
    up = generator.standard_normal((kind.rank, n), np.float32)
    return (np.roll(codes, layer, 1), scale), np.roll(up, layer, 1)


def coded_matrix(kind: Kind, n: int, k: int, layer: int) -> Any:
    """The CodedMatrix or CodebookMatrix of a layer: about normal weights, random vectors."""
    import torch

    from isofold.compiler.dialect.packing_codebook import CodebookMatrix
    from isofold.compiler.dialect.packing_coded import CodedMatrix
    from isofold.passes.code_ranges import quantize_codes

    generator = torch.Generator().manual_seed(SEED)
    if not kind.format[0].isdigit():
        rows = torch.randn(512, k, generator=generator) / k**0.5
        drawn = quantize_codes(rows.repeat(-(-n // 512), 1)[:n], kind.format, kind.group, "absmax")
        codes, scale = (t.roll(layer, 0) for t in (drawn.codes, drawn.scale))
        return CodedMatrix(codes, scale, drawn.multiplier, drawn.table, kind.format, kind.group)
    count, bits = (int(word) for word in kind.format.split("x"))
    codes = torch.randint(0, 2**bits, (n, k // 8, count), generator=generator, dtype=torch.int32)
    books = torch.randn(count, 2**bits, 8, generator=generator).half().float()
    dtype = torch.uint8 if bits == 8 else torch.uint16
    return CodebookMatrix(codes.roll(layer, 0).to(dtype), books, torch.full((n,), k**-0.5), k)


def reference(x: NDArray[np.float32], kind: Kind, n: int, k: int, layer: int) -> NDArray[np.float64]:
    """x times the dequantized weight of a layer, in float64."""
    if kind.format:
        decoded: NDArray[np.float64] = coded_matrix(kind, n, k, layer).dequantized().double().numpy()
        return x.astype(np.float64) @ decoded.T
    codes, scales = codes_and_scales(n, k, kind.bits, kind.group, layer)
    points = zero_points(kind, n, k, layer)
    centred: Any = codes if points is None else codes - np.repeat(points, kind.group, axis=1)
    weight: NDArray[np.float64] = centred * np.repeat(scales, k // scales.shape[1], axis=1).astype(np.float64)
    if kind.outliers:
        places, values = outliers(kind, n, k, layer)
        np.add.at(weight, (np.arange(n)[:, None], places), values.astype(np.float64))
    if kind.rank:
        (first, scale), up = thin_part(kind, n, k, layer)
        weight = weight + up.T @ (first * scale.astype(np.float64))
    if kind.hadamard:
        from isofold.compiler.hadamard_orders import signs

        weight = weight @ signs(k).astype(np.float64).T / np.sqrt(k)
    result: NDArray[np.float64] = x.astype(np.float64) @ weight.T
    return result


def _coded_node(
    kind: Kind, data: ExternalData, n: int, k: int, layer: int, source: str, target: str
) -> onnx.NodeProto:
    from isofold.compiler.dialect.packing_codebook import CodebookMatrix, pack_codebook
    from isofold.compiler.dialect.packing_coded import pack_coded

    matrix = coded_matrix(kind, n, k, layer)
    common: dict[str, Any] = {"n": n, "k": k, "format": kind.format, "activation": "none", "gated": 0}
    if isinstance(matrix, CodebookMatrix):
        stored = pack_codebook(matrix)
        tensors = {"weight": stored.weight, "codebooks": stored.codebooks, "scale": stored.scale}
        operator = "CodebookLinear"
    else:
        packed = pack_coded(matrix)
        tensors = {"weight": packed.weight, "scale": packed.scale}
        tensors |= {} if packed.table is None else {"table": packed.table}
        common |= {"group_size": packed.group_size, "scale_multiplier": packed.scale_multiplier}
        operator = "Fp8Linear" if kind.fp8_activations else "CodedLinear"
    inputs = [data.add(f"{name}{layer}", tensor.numpy()) for name, tensor in tensors.items()]
    sources = ["u", "params"] if kind.fp8_activations else [source]
    return helper.make_node(operator, [*sources, *inputs], [target], domain="ai.isofold", **common)


def _isofold_nodes(
    kind: Kind, data: ExternalData, n: int, k: int, layer: int, source: str, target: str
) -> Iterator[onnx.NodeProto]:
    if kind.format:
        if kind.fp8_activations and layer == 0:
            quantizer = ("QuantizeActivationFp8", [source], ["u", "params"])
            yield _with_hadamard(helper.make_node(*quantizer, domain="ai.isofold", align=32), [])
        yield _coded_node(kind, data, n, k, layer, source, target)
        return
    import torch

    from isofold.compiler.dialect import packing
    from isofold.compiler.dialect.outlier_packing import pack_outliers

    codes, scales = codes_and_scales(n, k, kind.bits, kind.group, layer)
    stored, _ = packing.storable_scale(torch.from_numpy(scales), kind.group)
    points = zero_points(kind, n, k, layer)
    zero = None if points is None else torch.from_numpy(points)
    packed = packing.pack_linear(torch.from_numpy(codes), stored, zero, kind.bits, kind.group)
    weight = data.add(f"weight{layer}", packed.weight.numpy())
    scale = data.add(f"scale{layer}", packed.scale.numpy())
    stored_zero = "" if packed.zero is None else data.add(f"zero{layer}", packed.zero.numpy())
    attributes: dict[str, Any] = {
        "n": n,
        "k": k,
        "bits": kind.bits,
        "group_size": kind.group,
        "scale_multiplier": float(packed.scale_multiplier),
        "activation": "none",
        "gated": 0,
        "domain": "ai.isofold",
    }
    sums, beside = packed.wsum.numpy(), []
    if kind.outliers:
        places, values = outliers(kind, n, k, layer)
        held = pack_outliers(torch.from_numpy(places), torch.from_numpy(values), k, 1.0)
        tensors = {"places": held.places, "values": held.values, "offsets": held.offsets}
        beside = [data.add(f"{name}{layer}", tensor.numpy()) for name, tensor in tensors.items()]
        attributes["outlier_multiplier"] = 1.0
        sums = (sums + values.astype(np.float64).sum(1)).astype(np.float32)
    if kind.float_activations:
        inputs = [source, weight, scale, stored_zero, *(["", "", *beside] if beside else [])]
        operator = "OutlierLinearFloat" if beside else "PackedLinearFloat"
        yield helper.make_node(operator, inputs, [target], **attributes)
        return
    wsum = data.add(f"wsum{layer}", sums)
    if not kind.shared_quantizer:
        inputs = [source, "", "", "", weight, scale, stored_zero, wsum]
        linear = helper.make_node("QuantizePackedLinear", inputs, [target], **attributes, input_bits=8)
        yield _with_hadamard(linear, [k] if kind.hadamard else [])
        return
    if layer == 0:
        yield _with_hadamard(
            helper.make_node(
                "QuantizeActivation",
                [source],
                ["u", "params"],
                domain="ai.isofold",
                bits=8,
                align=packing.alignment(kind.group),
            ),
            [],
        )
    inputs = ["u", "params", weight, scale, stored_zero, wsum]
    if kind.rank:
        (first, first_scale), up = thin_part(kind, n, k, layer)
        factor = packing.pack_linear(torch.from_numpy(first), torch.from_numpy(first_scale), None, 8, 0)
        down = [
            data.add(f"down{layer}", factor.weight.numpy()),
            data.add(f"downscale{layer}", factor.scale.numpy()),
        ]
        rest = {**attributes, "n": kind.rank, "bits": 8, "group_size": 0, "scale_multiplier": 1.0}
        yield helper.make_node("PackedLinearFloat", [source, *down], [f"thin{layer}"], **rest)
        yield helper.make_node("MatMul", [f"thin{layer}", data.add(f"up{layer}", up)], [f"residual{layer}"])
        inputs += ["", f"residual{layer}"]
    elif beside:
        inputs += ["", "", *beside]
    operator = "OutlierLinear" if beside else "PackedLinear"
    yield helper.make_node(operator, inputs, [target], **attributes)


def _with_hadamard(node: onnx.NodeProto, orders: list[int]) -> onnx.NodeProto:
    """make_node cannot tell the type of an empty list."""
    node.attribute.append(helper.make_attribute("hadamard", orders, attr_type=onnx.AttributeProto.INTS))
    return node


def _peer_nodes(
    kind: Kind, data: ExternalData, n: int, k: int, layer: int, source: str, target: str
) -> Iterator[onnx.NodeProto]:
    codes, scales = codes_and_scales(n, k, kind.bits, kind.group, layer)
    if kind.operator == "MatMulNBits":
        unsigned: NDArray[np.uint8] = (codes.astype(np.int16) + (1 << (kind.bits - 1))).astype(np.uint8)
        if kind.bits == 4:
            unsigned = unsigned[:, 0::2] | (unsigned[:, 1::2] << np.uint8(4))
        blocks = unsigned.reshape(n, k // kind.group, -1)
        yield helper.make_node(
            "MatMulNBits",
            [source, data.add(f"weight{layer}", blocks), data.add(f"scale{layer}", scales.reshape(-1))],
            [target],
            domain="com.microsoft",
            K=k,
            N=n,
            bits=kind.bits,
            block_size=kind.group,
            accuracy_level=kind.accuracy,
        )
    elif kind.operator == "DynamicQuantizeMatMul":
        inputs = [source, data.add(f"weight{layer}", codes.T), data.add(f"scale{layer}", scales[:, 0])]
        yield helper.make_node("DynamicQuantizeMatMul", inputs, [target], domain="com.microsoft")
    else:
        weight = (codes * np.repeat(scales, k // scales.shape[1], axis=1)).T
        yield helper.make_node("MatMul", [source, data.add(f"weight{layer}", weight)], [target])


def write(kind: Kind, m: int, n: int, k: int, layers: int, folder: Path) -> tuple[Path, int]:
    """Write the model of ``layers`` linears and return it with the bytes of weights and scales it holds.

    An existing file of the same name is taken as it is: the name says all that determines it.
    """
    stem = f"{kind.name.replace(' ', '-')}-m{m}-n{n}-k{k}-x{layers}"
    path, external = folder / f"{stem}.onnx", folder / f"{stem}.bin"
    size = folder / f"{stem}.bytes"
    if path.exists() and size.exists():
        return path, int(size.read_text())
    data = ExternalData(external)
    nodes: list[onnx.NodeProto] = []
    outputs = [f"y{layer}" for layer in range(layers)]
    make = _isofold_nodes if kind.ours else _peer_nodes
    for layer, output in enumerate(outputs):
        nodes.extend(make(kind, data, n, k, layer, "x", output))
    graph = helper.make_graph(
        nodes,
        stem,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [m, k])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [m, n]) for name in outputs],
        data.initializers,
    )
    data.stream.close()
    opsets = [
        helper.make_opsetid("", 20),
        helper.make_opsetid("com.microsoft", 1),
        helper.make_opsetid("ai.isofold", 1),
    ]
    beside = path.with_suffix(".tmp")
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(beside))
    size.write_text(str(data.tensor_bytes))
    beside.replace(path)
    return path, data.tensor_bytes
