"""Caches of floats that a decoder takes and returns become codes, found by the algebra of its graph alone."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F
from typer.testing import CliRunner

import isofold
from isofold.compiler.canonicalize import canonicalize
from isofold.compiler.capture import capture
from isofold.compiler.cli import app
from isofold.compiler.coded_cache import CodedCache, decoded, renumbered
from isofold.compiler.driver import Step, run_steps
from isofold.compiler.errors import RecipeError
from isofold.compiler.graph import argument
from isofold.compiler.html_report import render_html
from isofold.compiler.interface import cache_facts
from isofold.compiler.passes import PassReport
from isofold.compiler.program import Program
from isofold.compiler.recipe import Recipe, resolve
from isofold.passes.pipeline import plan
from isofold.passes.quantize_past import quantize_past

OPS: Any = torch.ops.isofold
Pairs = tuple[tuple[Tensor, Tensor], ...]
DEPTH, HEADS, GROUPS, WIDTH = 64, 4, 2, 48


def recipe(bits: int = 8, group: int = 0, **more: Any) -> Recipe:
    return Recipe.model_validate({"kv": {"bits": bits, "storage": "codes", "group": group}, **more})


class Layer(nn.Module):
    """Grouped attention over a cache; `seen` is what a subclass does with the joined keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, n * DEPTH) for n in (HEADS, GROUPS, GROUPS))
        self.o = nn.Linear(HEADS * DEPTH, WIDTH)

    def seen(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return keys, values

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        q, k, v = (f(x).unflatten(-1, (-1, DEPTH)).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (torch.cat([old, new], 2) for old, new in zip(past, (k, v), strict=True))
        keys, values = self.seen(k, v)
        y = F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)
        return x + self.o(y.transpose(1, 2).flatten(2)), (k, v)


class Decoder(nn.Module):
    """Two layers, the caches in a dictionary of tuples, a size that depends on a cache."""

    def __init__(self, part: Callable[[], nn.Module] = Layer) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = part(), part()

    def forward(self, x: Tensor, state: dict[str, Any]) -> dict[str, Any]:
        x = x + state["first"][0].shape[2]
        x, first = self.first(x, state["first"])
        x, second = self.second(x, state["second"])
        return {"second": second, "y": x, "first": first}


def floats(tokens: int, seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    return {
        name: tuple(torch.randn(1, GROUPS, tokens, DEPTH, generator=g) for _ in range(2))
        for name in ("first", "second")
    }


def token(seed: int = 1) -> Tensor:
    return torch.randn(1, 1, WIDTH, generator=torch.Generator().manual_seed(seed))


GROWS = {2: Dim("past", min=1, max=4096)}
SIZES = (None, {"first": (GROWS, GROWS), "second": (GROWS, GROWS)})


def passed(
    model: nn.Module, args: tuple[Any, ...], form: Recipe, sizes: Any = None
) -> tuple[Program, PassReport]:
    program = capture(model.eval(), args, None, sizes)
    after, (_, report) = run_steps(program, [Step(canonicalize), Step(quantize_past, {"recipe": form})])
    return after, report


def empty(program: Program) -> dict[str, Any]:
    """The state of a program with codes, without tokens."""
    return {
        n: tuple(tuple(t[:, :, :0] for t in pair) for pair in held)
        for n, held in program.example_args[1].items()
    }


def test_inputs_and_outputs_become_codes_and_pairs_in_their_places() -> None:
    after, report = passed(Decoder(), (token(), floats(6)), recipe(4), SIZES)
    assert [n.name for n in after.placeholders] == [
        "x",
        *(
            f"state_{layer}_{i}_{part}"
            for layer in ("first", "second")
            for i in (0, 1)
            for part in ("codes", "pairs")
        ),
    ]
    state = after.example_args[1]
    assert state["first"][0][0].shape == (1, GROUPS, 6, DEPTH // 2)
    assert state["first"][0][1].shape == (1, GROUPS, 6, 2)
    assert after.dynamic_shapes == (None, dict.fromkeys(("first", "second"), ((GROWS, GROWS),) * 2))
    results = after(token(), state)
    assert list(results) == ["second", "y", "first"]
    assert results["first"][1][0].dtype == torch.uint8
    assert results["first"][1][0].shape == (1, GROUPS, 7, DEPTH // 2)
    assert [(c.name, c.kind, c.output) for c in after.caches] == [
        ("state_second_0", "keys", 0),
        ("state_second_1", "values", 2),
        ("state_first_0", "keys", 5),
        ("state_first_1", "values", 7),
    ]
    assert report.error is not None
    assert 1e-3 < report.error < 0.3
    assert [entry.facts["inputs"] for entry in report.applied] == [
        ["state_first_0", "state_first_1"],
        ["state_second_0", "state_second_1"],
    ]
    after.check_inputs((token(), empty(after)), {})


@pytest.mark.parametrize(("bits", "bound"), [(8, 0.01), (4, 0.15)])
@pytest.mark.parametrize("fold", [None, {"rotation": "hadamard"}])
@pytest.mark.parametrize("group", [0, 32])
def test_a_decode_loop_is_near_to_floats(bits: int, bound: float, fold: Any, group: int) -> None:
    model = Decoder().eval()
    program = capture(model, (token(), floats(6)), None, SIZES)
    after, _ = run_steps(program, plan(program, recipe(bits, group, fold=fold)))
    assert after.example_args[1]["first"][0][1].shape == (1, GROUPS, 6, 4 if group else 2)
    kinds = Counter(str(n.target) for n in after.graph.nodes if n.op == "call_function")
    assert kinds["isofold.attention_cached.default"] == 2
    assert not kinds["isofold.dequantize_cache.default"]
    # Of queries; those of keys are in the quantizers, but for groups of what was turned.
    assert kinds["isofold.hadamard.default"] == (0 if not fold else 4 if group else 2)
    state, exact = empty(after), floats(0)
    for step in range(5):
        x = token(step)
        got, wanted = after(x, state), model(x, exact)
        error = float((got["y"] - wanted["y"]).norm() / wanted["y"].norm())
        assert error < bound
        state, exact = ({n: r[n] for n in state} for r in (got, wanted))
    (keys,) = [c for c in after.caches if c.name == "state_first_0"]
    back = keys.decode(*state["first"][0])
    assert float((back - exact["first"][0]).norm() / back.norm()) < bound


def test_codes_are_those_of_the_quantizer_and_decode_undoes_what_stands_before() -> None:
    x = torch.randn(2, 3, 5, DEPTH, generator=torch.Generator().manual_seed(0))
    signs = tuple(float(s) for s in torch.randint(0, 2, (DEPTH,)) * 2 - 1)
    plain = CodedCache("k", "keys", ("a", "b"), 0, DEPTH, 8)
    assert all(map(torch.equal, plain.encode(x), OPS.quantize_cache(x, None, 8, [])))
    turned = CodedCache("k", "keys", ("a", "b"), 0, DEPTH, 8, 0, (32,), signs)
    grouped = CodedCache("k", "keys", ("a", "b"), 0, DEPTH, 8, 32, (32,), signs)
    for cache in (plain, turned, grouped):
        assert CodedCache.from_json(json.loads(json.dumps(cache.to_json()))) == cache
        assert float((cache.decode(*cache.encode(x)) - x).abs().max()) < 0.03
    assert not torch.equal(turned.encode(x)[0], plain.encode(x)[0])


def test_numbers_of_outputs_follow_when_caches_are_added() -> None:
    first = CodedCache("b", "keys", ("b0", "b1"), 2, 8, 8)
    second = CodedCache("a", "keys", ("a0", "a1"), 0, 8, 8)
    (one,) = renumbered((), [first])
    assert one.output == 2  # x, y, b  →  x, y, codes, pairs
    assert [c.output for c in renumbered([one], [second])] == [0, 3]  # codes, pairs, y, codes, pairs
    x = torch.ones(1, 1, 2, 8)
    flat = [*second.encode(x), "y", *first.encode(2 * x)]
    back = decoded(renumbered([one], [second]), flat)
    assert [b if isinstance(b, str) else float(b.mean()) for b in back] == [1.0, "y", 2.0]


def test_a_program_with_coded_caches_is_stored_and_read(tmp_path: Path) -> None:
    after, _ = passed(Decoder(), (token(), floats(6)), recipe(8), SIZES)
    after.save(tmp_path / "model.pt2")
    again = Program.load(tmp_path / "model.pt2")
    assert again.caches == after.caches
    same = again(token(), after.example_args[1])
    assert torch.equal(same["first"][0][0], after(token(), after.example_args[1])["first"][0][0])


class Sliding(Layer):
    """Attends to the last tokens only."""

    def seen(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return keys[:, :, -4:], values[:, :, -4:]


class Scored(Layer):
    """Returns the joined keys, and does something else with them."""

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, (k, v) = super().forward(x, past)
        return y + k.mean(), (k, v)


class Read(Layer):
    """Looks at the old keys."""

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return super().forward(x + past[0].amax(), past)


class Joined(nn.Module):
    """One attention on what a function makes of past and new keys, and of values; returned: how often the keys are."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor], returned: int = 1) -> None:
        super().__init__()
        self.join, self.returned = join, returned

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        keys, values = (self.join(old, x.tanh()) for old in past)
        y = F.scaled_dot_product_attention(x, keys, values)
        return y, *[keys] * self.returned, values


def joined(**options: Any) -> tuple[nn.Module, tuple[Any, ...]]:
    past = floats(6)["first"]
    return Joined(**options), (torch.randn(1, GROUPS, 6, DEPTH), past)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ((Decoder(Sliding), (token(), floats(6))), "its keys stay floats: they come from aten.slice.Tensor"),
        ((Decoder(Scored), (token(), floats(6))), "its keys stay floats: aten.mean.default reads them too"),
        ((Decoder(Read), (token(), floats(6))), "aten.amax.default reads the input state_first_0 too"),
        (joined(join=lambda old, new: old), "the input past_0 is read as it is, and no new tokens are joined"),
        (joined(join=lambda old, new: torch.cat([new, old], 2)), "the input past_0 is joined behind other tokens"),
        (joined(join=lambda old, new: torch.cat([new, new], 2)), "no input is joined in front"),
        (joined(join=lambda old, new: torch.cat([old, new, new], 2)[:, :, :12]), "aten.slice.Tensor"),
        (joined(join=lambda old, new: old + new), "they come from aten.add.Tensor"),
        (joined(join=lambda old, new: torch.cat([old, new], 2), returned=0), "are returned 0 times, not once"),
        (joined(join=lambda old, new: torch.cat([old, new], 2), returned=2), "are returned 2 times, not once"),
    ],
)  # fmt: skip
def test_refusals(case: tuple[nn.Module, tuple[Any, ...]], reason: str) -> None:
    model, args = case
    with torch.no_grad():
        wanted = model(*args)
    after, report = passed(model, args, recipe())
    assert not report.applied
    assert not after.caches
    assert any(reason in entry.reason for entry in report.refused), [e.reason for e in report.refused]
    assert len(after.placeholders) == len(torch.utils._pytree.tree_leaves(args))
    with torch.no_grad():
        found = after(*args)
    assert torch.equal(torch.utils._pytree.tree_leaves(found)[0], torch.utils._pytree.tree_leaves(wanted)[0])


def decoder_of(depth: int) -> nn.Module:
    """One layer with heads of another size."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(WIDTH, GROUPS * depth) for _ in range(3))

        def forward(self, x: Tensor, past: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
            q, k, v = (f(x).unflatten(-1, (-1, depth)).transpose(1, 2) for f in (self.q, self.k, self.v))
            k, v = (torch.cat([old, new], 2) for old, new in zip(past, (k, v), strict=True))
            return F.scaled_dot_product_attention(q, k, v), k, v

    return Heads().eval()


def test_groups_must_divide_heads_and_be_stored() -> None:
    after, _ = passed(Decoder(), (token(), floats(6)), recipe(8, 64))
    assert {cache.group for cache in after.caches} == {64}
    past = tuple(torch.randn(1, GROUPS, 3, 96) for _ in range(2))
    _, report = passed(decoder_of(96), (token(), past), recipe(8, 64))
    assert "groups of 64 do not divide heads of 96 dimensions" in report.refused[0].reason
    small, _ = passed(decoder_of(48), (token(), tuple(t[..., :48] for t in past)), recipe(8, 64))
    assert {cache.group for cache in small.caches} == {0}  # a head is less than a group
    with pytest.raises(RecipeError, match="storage must be codes"):
        resolve({"kv": {"bits": 8, "group": 32}})


def test_a_cache_that_one_attention_cannot_read_as_codes_stays_float_for_all() -> None:
    class Shared(nn.Module):
        def forward(self, q: Tensor, k: Tensor, past: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
            keys, values = (torch.cat([old, k], 2) for old in past)
            first = F.scaled_dot_product_attention(q, keys, values)
            return F.scaled_dot_product_attention(first, keys, values.tanh()), keys, values

    q, k = (torch.randn(1, GROUPS, 2, DEPTH) for _ in range(2))
    _, report = passed(Shared(), (q, k, floats(6)["first"]), recipe())
    assert not report.applied
    reasons = sorted(entry.reason for entry in report.refused)
    assert "they come from aten.tanh.default" in reasons[1]
    assert "reads them too" in reasons[0]


def test_recipes_without_codes_leave_the_interface() -> None:
    rounded = Recipe.model_validate({"kv": {"bits": 8}})
    program = capture(Decoder().eval(), (token(), floats(6)), None, SIZES)
    after, reports = run_steps(program, plan(program, rounded))
    assert "quantize_past" not in [r.name for r in reports]
    assert not after.caches
    only = Recipe.model_validate(
        {"kv": {"bits": 8}, "layers": [{"match": "second", "kv": {"bits": 4, "storage": "codes"}}]}
    )
    after, _ = run_steps(program, plan(program, only))
    assert {c.name for c in after.caches} == {"state_second_0", "state_second_1"}
    rounded_keys = [n for n in after.graph.nodes if n.target == OPS.quantize_dequantize.default]
    assert len(rounded_keys) == 2


class HuggingFace(nn.Module):
    """A transformers decoder with its caches as plain tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, past: Pairs) -> tuple[Tensor, Pairs]:
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (keys, values) in enumerate(past):
            cache.update(keys, values, layer)
        logits = self.model(input_ids=ids, past_key_values=cache).logits
        return logits, tuple((layer.keys, layer.values) for layer in cache.layers)


def hugging_face(kind: str) -> HuggingFace:
    import transformers

    sizes: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 97, "max_position_embeddings": 128,
    }  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes)
    return HuggingFace(getattr(transformers, f"{kind}ForCausalLM")(config).eval()).eval()


def floats_of(tokens: int) -> Pairs:
    g = torch.Generator().manual_seed(tokens)
    return tuple(
        (torch.randn(1, 2, tokens, 16, generator=g), torch.randn(1, 2, tokens, 16, generator=g))
        for _ in range(2)
    )


@pytest.mark.parametrize(
    ("kind", "bits", "fold", "target"),
    [
        ("Llama", 4, {"rotation": "hadamard"}, "cpu"),
        ("Llama", 8, None, "tvm-cpu"),
        ("Qwen3", 8, {"rotation": "hadamard"}, "cpu"),
        ("Qwen3", 4, None, "tvm-cpu"),
    ],
)
def test_a_transformers_decoder_feeds_its_codes_back(kind: str, bits: int, fold: Any, target: str) -> None:
    model, grows = hugging_face(kind), {2: Dim.AUTO}
    args, sizes = (torch.tensor([[3]]), floats_of(6)), (None, ((grows, grows),) * 2)
    chosen = recipe(bits, fold=fold, weights={"bits": 8}, activations={"mode": "dynamic"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = capture(model, args, None, sizes)
    own, _ = run_steps(program, plan(program, chosen), verify=False)
    assert sum(n.target == OPS.attention_cached.default for n in own.graph.nodes) == 2
    compiled = isofold.compile(program, recipe=chosen, target=target, measure=False)
    ports = {p.name: p for p in compiled.inputs}
    for facts in compiled.manifest["caches"]:
        codes, pairs = (ports[name] for name in facts["inputs"])
        assert (codes.dtype, codes.shape[1], codes.shape[3]) == ("uint8", 2, 32 * bits // 8)
        assert (pairs.dtype, pairs.shape[3]) == ("float32", 2)
        assert set(facts["outputs"]) <= {p.name for p in compiled.outputs}
        assert facts["group"] == 0
        assert facts["token_bytes"] == 2 * (32 * bits // 8 + 8)
        assert facts["float_bytes"] == 2 * 16 * 4
    state = own_state = tuple(
        tuple(tuple(t[:, :, :0] for t in pair) for pair in layer) for layer in own.example_args[1]
    )
    exact = floats_of(0)
    for step in range(4):
        ids = torch.tensor([[5 + 7 * step]])
        got, state = compiled(ids, state)
        wanted, own_state = own(ids, own_state)
        reference, exact = model(ids, exact)
        assert state[0][0][0].shape == (1, 2, step + 1, 32 * bits // 8)
        assert float((torch.as_tensor(got) - wanted).norm() / wanted.norm()) < 0.02
        assert float((wanted - reference).norm() / reference.norm()) < (0.15 if bits == 4 else 0.05)


def test_the_report_the_file_and_inspect_say_what_changed(tmp_path: Path) -> None:
    model = Decoder().eval()
    folder = tmp_path / "decoder"
    compiled = isofold.compile(
        model, (token(), floats(6)), dynamic_shapes=SIZES, recipe=recipe(4), output=folder, measure=False
    )
    caches = compiled.report["caches"]
    assert caches == compiled.manifest["caches"]
    assert caches[2]["inputs"] == ["state_first_0_codes", "state_first_0_pairs"]
    assert caches[2]["was"] == "state_first_0"
    assert caches[2]["outputs"] == [p.name for p in compiled.outputs][5:7]
    held = {
        p.key: p.value for p in onnx.load(str(folder / "model.onnx"), load_external_data=False).metadata_props
    }
    assert json.loads(held["isofold.caches"]) == caches
    assert "Caches of codes" in render_html(compiled.report)
    assert {d for p in compiled.inputs for d in p.shape if isinstance(d, str)} == {"past"}
    done = CliRunner().invoke(app, ["inspect", str(folder), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["caches"] == caches
    shown = CliRunner().invoke(app, ["inspect", str(folder)], env={"COLUMNS": "200"})
    assert "state_first_0_codes" in shown.stdout
    plain = isofold.compile(model, (token(), floats(6)), recipe="float32", measure=False)
    assert plain.manifest["caches"] == []
    assert "Caches of codes" not in render_html(plain.report)


def test_facts_of_a_program_name_its_outputs() -> None:
    after, _ = passed(Decoder(), (token(), floats(6)), recipe(8), SIZES)
    assert next(f["outputs"] for f in cache_facts(after)) == ["second_0_0", "second_0_1"]
    cats = [n for n in after.graph.nodes if n.target == torch.ops.aten.cat.default]
    assert all(argument(n, "dim") == 2 for n in cats)
