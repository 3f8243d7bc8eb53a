"""`lomo-kernels` itself and its doctor."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lomo_kernels
from lomo_kernels import cli, ops


def test_doctor_is_content_with_a_cpu(capsys):
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out.splitlines()
    lines = {line[:24].strip(): line[24:].strip() for line in printed}
    assert lines["lomo_kernels"] == lomo_kernels.__version__
    assert lines["installed as"] == f"source tree in {Path(__file__).parent.parent}"
    assert lines["torch"] == torch.__version__
    assert lines["native on cpu"] == lines["reference on cpu"] == "runs"
    assert lines["auto on cpu"] == "native"
    info = ops.build_info()
    assert lines["cpu instruction set"] == info["cpu instruction set"]
    assert lines["cuda architectures"] == info["cuda architectures"]
    for name in ops.BACKENDS:
        reason = ops.unavailable(name, "cpu")
        assert lines[f"{name} on cpu"] == ("runs" if reason is None else f"no: {reason}")


def test_doctor_says_what_is_missing(capsys, monkeypatch):
    """A checkout that was not built: the reference still runs."""
    monkeypatch.setitem(sys.modules, "lomo_kernels._C", None)
    monkeypatch.delattr(lomo_kernels, "_C")
    monkeypatch.delitem(sys.modules, "lomo_kernels.ops.native")
    monkeypatch.delattr(ops, "native")
    assert cli.main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "extension module        missing: " in printed
    assert "reference on cpu        runs" in printed


def test_doctor_says_that_triton_is_too_old(capsys, monkeypatch):
    triton = pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.delattr(triton, "knobs")
    monkeypatch.setitem(sys.modules, "triton.knobs", None)
    monkeypatch.setattr(triton, "__version__", "3.2.0")
    for name in [name for name in sys.modules if name.startswith("lomo_kernels.ops.triton")]:
        monkeypatch.delitem(sys.modules, name)
    assert cli.main(["doctor"]) == 0
    said = "triton on cpu           no: the kernels need triton 3.4 or later, got 3.2.0"
    assert said in capsys.readouterr().out


def test_installed_command():
    result = subprocess.run(
        [sys.executable, "-m", "lomo_kernels.cli", "--version"], capture_output=True, text=True
    )
    assert (result.returncode, result.stdout.strip()) == (0, lomo_kernels.__version__)


def test_no_command_is_an_error(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([])
    assert stopped.value.code == 2
    assert "command" in capsys.readouterr().err
