"""`python -m mpipar.data` as a user meets it: help, exit codes, one message, and a kill in the middle."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpipar.data.recipe import PackSettings
from mpipar.errors import ConfigError


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mpipar.data", *map(str, arguments)], capture_output=True, text=True, timeout=50
    )


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {n} of {n % 97} and {n * n}\n" for n in range(60_000)))
    return path


def test_pack_info_verify(text: Path, tmp_path: Path) -> None:
    packed = run("pack", text, "--out", tmp_path / "out", "--vocab-size", "300")
    assert (packed.returncode, packed.stderr) == (0, "")
    assert "packed in " in packed.stdout
    info = run("info", tmp_path / "out")
    assert info.returncode == 0
    assert "vocabulary of 300" in info.stdout
    assert info.stdout in packed.stdout
    verified = run("verify", tmp_path / "out")
    assert (verified.returncode, verified.stdout) == (0, f"{tmp_path}/out: all is well\n")

    record = tmp_path / "out/pack.json"
    said = record.read_text()
    record.write_text("[]")
    for refused in (
        run("verify", tmp_path / "out"),
        run("pack", text, "--out", tmp_path / "out", "--vocab-size", "300"),
    ):
        assert refused.returncode == 1 and f"{record}, which says what" in refused.stdout + refused.stderr
    record.write_text(said)

    shard = tmp_path / "out/train-00000.h5"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    verified = run("verify", tmp_path / "out")
    assert verified.returncode == 1
    assert f"{shard}: array 'tokens' is damaged in block 0" in verified.stdout


def test_errors_are_one_message(tmp_path: Path) -> None:
    for arguments, code, message in [
        (("pack", tmp_path / "none", "--out", tmp_path / "out"), 1, "mpipar: error: no such input"),
        (("info", tmp_path / "none"), 1, "mpipar: error: there is no data set at"),
        (("pack", "stdlib"), 2, "mpipar: error: required options: Missing from python -m mpipar.data pack: --out PATH"),
    ]:
        failed = run(*arguments)
        assert failed.returncode == code
        assert failed.stdout == ""
        assert len(failed.stderr.splitlines()) == 1
        assert message in failed.stderr


def test_help_names_the_commands() -> None:
    shown = run("--help")
    assert shown.returncode == 0
    assert all(word in shown.stdout for word in ("pack", "info", "verify", "stdlib", "mpirun"))


def test_a_killed_pack_leaves_nothing_that_looks_like_a_data_set(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "mpipar.data", "pack", str(text), "--out", str(out), "--vocab-size", "300"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 40
        while not any(tmp_path.glob(".partial-*/train-*.h5")):
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()
    assert not out.exists()
    assert run("info", out).returncode == 1
    assert run("pack", text, "--out", out, "--vocab-size", "300").returncode == 0


@pytest.mark.parametrize("fraction", [-0.1, 0.6, float("nan")])
def test_val_fraction_is_a_share(fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"--val-fraction .* is not a share of the text"):
        PackSettings(val_fraction=fraction)


def test_vocabulary_too_small() -> None:
    with pytest.raises(ConfigError, match=r"--vocab-size 259 is too small.* 260"):
        PackSettings(vocab_size=259)
