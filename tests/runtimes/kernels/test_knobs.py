"""The registry of knobs: what settings may say, where values are to be had, what a measurement depends on."""

from __future__ import annotations

import pickle
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from isofold.runtimes.kernels import attention, dense, knobs, linear, linear_float
from isofold.runtimes.kernels.codegen import ISAS, V4, Kernel, T, compile_object, header, store, table
from isofold.runtimes.kernels.knobs import DEFAULTS, DRIVER, KNOBS, Settings, driver_values, knob, using
from isofold.runtimes.module_sources import module_closure

GROUPS = {k.group for module in (linear, linear_float, dense, attention) for k in module.KERNELS}


def test_every_knob_belongs_to_kernels_and_may_be_its_default() -> None:
    for one in KNOBS:
        assert len(set(one.values)) == len(one.values) > 1, one.name
        assert one.why
        for pattern in one.groups:
            groups = [g for g in (*GROUPS, DRIVER) if fnmatchcase(g, pattern)]
            assert groups, f"{one.name}: no group is called {pattern}"
            for group in groups:
                for isa in ISAS:
                    assert one.default_of(isa.name, group) in one.values


def test_settings_are_values_checked_and_picklable() -> None:
    one = Settings({"linear_gemv4": {"stream_near": 0, "gemv_panels": 4}, DRIVER: {"gemv_rows": 16}})
    other = Settings({DRIVER: {"gemv_rows": 16}, "linear_gemv4": {"gemv_panels": 4, "stream_near": 0}})
    assert one == other
    assert hash(one) == hash(other)
    assert pickle.loads(pickle.dumps(one)) == one
    assert Settings(one.to_json()) == one
    assert one.resolve("linear_gemv4", "stream_near", "v4") == 0
    assert one.resolve("linear_gemv3", "stream_near", "v4") == 2048
    assert one.resolve("linear_pc", "tile_rows", "v4") == 8
    assert one.resolve("linear_pc", "tile_rows", "v3") == 4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"linear_gemv4": {"stream_nearer": 1}}, "no knob 'stream_nearer'; it has: stream_near, "),
        ({"linear_end": {"stream_near": 0}}, "'linear_end' has no knob 'stream_near'; it has: none"),
        ({"linear_gemv4": {"stream_near": 17}}, r"is 17; allowed: \(0, 1024"),
    ],
)
def test_wrong_settings_are_refused(values: dict[str, dict[str, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(values)


def test_values_are_to_be_had_only_while_a_kernel_is_built() -> None:
    with pytest.raises(LookupError):
        knob("stream_near")
    with using(Settings({"linear_gemv4": {"stream_near": 0}}), "v4", "linear_gemv4"):
        assert knob("stream_near") == 0
        with using(DEFAULTS, "v4", "linear_gemv4"):
            assert knob("stream_near") == 2048
        assert knob("stream_near") == 0
    with pytest.raises(LookupError):
        knob("stream_near")


def _emit(isa: object, x: object) -> None:
    store(x, 0, T.int64(knob("stream_near")), 1)


def test_settings_reach_the_emitter_and_do_not_outlive_a_build(tmp_path: Path) -> None:
    kernel = Kernel("constant", "x: i64*", _emit, "linear_gemv4")
    settings = Settings({"linear_gemv4": {"stream_near": 4096}})
    texts = [
        compile_object([kernel], V4, tmp_path / name, chosen, assembly=True).read_text()
        for name, chosen in (("a", DEFAULTS), ("b", settings), ("c", DEFAULTS))
    ]
    assert "$4096" in texts[1]
    assert "$2048" in texts[0]
    assert texts[0] == texts[2]


def test_drivers_read_their_knobs_from_the_table() -> None:
    kernel = Kernel("constant", "x: i64*", _emit, "linear_gemv4")
    settings = Settings({DRIVER: {"gemv_rows": 16}, "linear_gemv4": {"gemv_panels": 2}})
    text = header([kernel], settings={"v4": settings})
    assert "int64_t gemv_rows;" in text
    assert "int64_t gemv_panels_linear_gemv4;" in text
    assert table([kernel], V4, "isofold_kernels_v4", settings) in text
    assert driver_values(settings, "v4")["gemv_rows"] == 16
    assert driver_values(DEFAULTS, "v3")["gemv_rows"] == 8
    assert "{0, " in table([kernel], V4, "t", settings, groups=())


def test_drivers_know_how_far_ahead_kernels_have_asked_for_weights() -> None:
    near = Settings(
        {"linear_gemv4": {"stream_near": 8192, "stream_far": 0}, "linear_float3": {"stream_far": 4096}}
    )
    values = driver_values(near, "v4")
    assert values["streamed_linear_gemv4"] == 8192
    assert values["streamed_linear_float3"] == 4096
    both = [DEFAULTS.resolve("linear_gemv2", name, "v4") for name in ("stream_near", "stream_far")]
    assert values["streamed_linear_gemv2"] == max(both)


def test_the_hash_of_sources_covers_what_is_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = {path.name for path in module_closure(Path(knobs.__file__).parent, "linear")}
    assert {"linear.py", "codec.py", "codegen.py", "dot.py", "math.py", "knobs.py"} <= names
    assert "attention.py" not in names
    before = knobs.sources("linear_gemv4")
    for path in Path(knobs.__file__).parent.iterdir():
        if path.suffix in (".py", ".h"):
            (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(knobs, "_HERE", tmp_path)
    knobs.sources.cache_clear()
    try:
        assert knobs.sources("linear_gemv4") == before
        knobs.sources.cache_clear()
        (tmp_path / "codec.py").write_text((tmp_path / "codec.py").read_text() + "\n")
        assert knobs.sources("linear_gemv4") != before
        with pytest.raises(ValueError, match="no kernels are tuned"):
            knobs.sources("norm")
    finally:
        knobs.sources.cache_clear()
