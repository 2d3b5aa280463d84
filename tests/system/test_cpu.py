"""CPU features, from the kernel's report and from variables that disable them in torch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from shoal.system import cpu

ZEN3 = "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC 7B13\nflags\t\t: fpu avx avx2 fma\n"
SKYLAKE = "processor\t: 0\nmodel name\t: Xeon\nflags\t\t: avx2 avx512f avx512bw avx512vl\n"
COOPER = "processor\t: 0\nmodel name\t: Xeon\nflags\t\t: avx2 avx512f avx512_bf16 avx_vnni\n"
SAPPHIRE = "processor\t: 0\nmodel name\t: Xeon\nflags\t\t: avx2 avx512f avx512_bf16 amx_bf16 amx_tile\n"
ZEN4 = "processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC\nflags\t\t: avx2 avx512f avx512_bf16\n"
GRAVITON2 = "processor\t: 0\nBogoMIPS\t: 243.75\nFeatures\t: fp asimd atomics\n"
GRAVITON3 = "processor\t: 0\nBogoMIPS\t: 243.75\nFeatures\t: fp asimd sve i8mm bf16\n"
SECOND = "\nprocessor\t: 1\nflags\t\t: avx512_bf16 amx_bf16\nFeatures\t: bf16\n"  # not read


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    cpu.features.cache_clear()
    cpu.model_name.cache_clear()
    yield
    cpu.features.cache_clear()
    cpu.model_name.cache_clear()


@pytest.mark.parametrize(
    ("info", "told", "bfloat16", "tiles"),
    [
        (ZEN3, {}, False, False),
        (SKYLAKE, {}, False, False),
        (COOPER, {}, True, False),
        (SAPPHIRE, {}, True, True),
        (GRAVITON2, {}, False, False),
        (GRAVITON3, {}, True, False),
        ("", {}, False, False),
        (SAPPHIRE, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, False, False),
        (SAPPHIRE, {"ONEDNN_MAX_CPU_ISA": "avx512_core_bf16"}, True, False),
        (SAPPHIRE, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, True, True),
        (SAPPHIRE, {"ONEDNN_MAX_CPU_ISA": "ALL"}, True, True),
        (SAPPHIRE, {"DNNL_MAX_CPU_ISA": "AVX512_CORE"}, False, False),
        (SAPPHIRE, {"ATEN_CPU_CAPABILITY": "avx2"}, False, False),
        (SAPPHIRE, {"ATEN_CPU_CAPABILITY": "avx512"}, True, True),
    ],
)
def test_bfloat16_needs_instructions_that_torch_may_use(
    info: str, told: dict[str, str], bfloat16: bool, tiles: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(info + SECOND if info else "")
    monkeypatch.setattr(cpu, "_INFO", tmp_path / "cpuinfo")
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert (cpu.multiplies_bfloat16(), cpu.has_tiles()) == (bfloat16, tiles)
    assert bool({"avx512_bf16", "bf16"} & set(cpu.instructions())) == bfloat16
    assert ("amx_bf16" in cpu.instructions()) == tiles


@pytest.mark.parametrize(
    ("info", "told", "expected"),
    [
        (ZEN4, {}, True),
        (ZEN3, {}, False),
        (SAPPHIRE, {}, False),
        (GRAVITON3, {}, False),
        ("", {}, False),
        (ZEN4, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, False),
        (ZEN4, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, True),
        (ZEN4, {"ATEN_CPU_CAPABILITY": "avx2"}, False),
    ],
)
def test_onednn_multiplies_best_on_amd_with_avx512(
    info: str, told: dict[str, str], expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(info)
    monkeypatch.setattr(cpu, "_INFO", tmp_path / "cpuinfo")
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert cpu.multiplies_best_with_onednn() is expected


def test_on_macos_the_system_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"hw.optional.arm.FEAT_BF16": "1", "machdep.cpu.brand_string": "Apple M2"}
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr(cpu, "_sysctl", lambda name: said.get(name, ""))
    assert cpu.multiplies_bfloat16()
    assert cpu.model_name() == "Apple M2"


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 16),
        ({"cpu.max": "max 100000"}, 16),
        ({"cpu.max": "150000 100000"}, 2),
        ({"mine/cpu.max": "400000 100000", "cpu.max": "max 100000"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 16),
        ({"cpu/mine/cpu.cfs_quota_us": "50000", "cpu/mine/cpu.cfs_period_us": "100000"}, 1),
    ],
)
def test_a_containers_share_of_time_counts_as_cores(
    files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(16))
    (tmp_path / "self").write_text("4:cpu:/mine\n0::/mine\n")
    monkeypatch.setattr(cpu, "_GROUP", tmp_path / "self")
    monkeypatch.setattr(cpu, "_GROUPS", tmp_path)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert cpu.count_cores() == cores


ON_ONE_CORE = """
import os, sys
from shoal.system.cpu import count_cores
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
print(count_cores(), "torch" in sys.modules)
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not bind processes to cores")
def test_one_core_that_a_process_is_bound_to_is_one() -> None:
    done = subprocess.run([sys.executable, "-c", ON_ONE_CORE], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "False"]


@pytest.mark.parametrize(
    ("load", "busy_percent", "free"),
    [
        (0.2, 100.0, 8.0),  # the load is too low to check
        (4.0, 50.0, 4.0),
        (40.0, 100.0, 0.0),
        (6.0, 0.0, 8.0),  # the load is from programs that have ended
        (2.0, 100.0, 6.0),
    ],
)
def test_a_core_is_taken_where_load_and_a_look_agree(
    load: float, busy_percent: float, free: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "count_cores", lambda: 8)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: busy_percent)
    assert cpu.free_cores() == free
