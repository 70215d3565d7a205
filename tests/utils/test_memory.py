"""What control groups leave of memory, in folders made like the kernel's."""

import sys

import psutil
import pytest
import torch

from secateur.utils import memory as room

CPU = torch.device("cpu")


def group(folder, limit, used, inactive):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 12\ninactive_file {inactive}\nactive_file 7\n")


@pytest.fixture
def root(monkeypatch, tmp_path):
    root = tmp_path / "cgroup"
    root.mkdir()
    (tmp_path / "member").write_text("1:name=systemd:/other\n0::/outer/inner\n")
    monkeypatch.setattr(room, "CGROUP", root)
    monkeypatch.setattr(room, "MEMBER", tmp_path / "member")
    return root


def test_the_tightest_group_around_a_process_counts(root):
    """The mistake: to look at the root alone, which has no limit, or at the own group alone."""
    group(root / "outer" / "inner", "max", 5, 0)
    group(root / "outer", 10**6, 9 * 10**5, 3 * 10**4)
    group(root / "elsewhere", 10, 5, 0)
    assert room.free_bytes(CPU) == 13 * 10**4
    group(root / "outer" / "inner", 10**6, 999_000, 0)
    assert room.free_bytes(CPU) == 1000


def test_without_a_limit_the_system_is_asked(root):
    group(root / "outer", "max", 5, 0)
    assert room.free_bytes(CPU) > 10**6
    (root / "outer" / "memory.stat").unlink()
    assert room.free_bytes(CPU) > 10**6


def test_a_group_that_is_over_its_limit_leaves_nothing(root):
    group(root / "outer" / "inner", 10**6, 2 * 10**6, 10)
    assert room.free_bytes(CPU) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="the limits of Linux")
@pytest.mark.parametrize("kind", ["RLIMIT_DATA", "RLIMIT_AS"])
def test_a_limit_on_the_process_counts(monkeypatch, root, kind):
    limits = {getattr(psutil, kind): 10**15}
    own = psutil.Process.rlimit
    monkeypatch.setattr(
        psutil.Process,
        "rlimit",
        lambda self, which: (limits[which],) * 2 if which in limits else own(self, which),
    )
    whole = room.free_bytes(CPU)
    held = getattr(psutil.Process().memory_info(), "rss" if kind == "RLIMIT_DATA" else "vms")
    limits[getattr(psutil, kind)] = held + whole // 2
    assert room.free_bytes(CPU) < whole * 0.6
