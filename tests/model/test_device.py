"""Which device a command computes on, and what it says when that is not what the machine could do."""

import os
import subprocess
from importlib import metadata

import pytest
import torch

from base import packages
from base.cli import UserError
from model import device as devices
from model.device import choose_device, print_notes


@pytest.fixture
def accelerator(monkeypatch):
    """accelerator("xpu") makes torch believe that the machine has one, whose kernels run."""

    def pretend(name: str | None):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: name is not None)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(name))

    monkeypatch.setattr(devices, "run_a_kernel", lambda device: None)
    monkeypatch.setattr(devices, "try_flash", lambda device: None)
    return pretend


@pytest.mark.parametrize(
    ("name", "processes", "chosen"),
    [
        (None, 1, "cpu"),
        ("cuda", 2, "cuda:1"),
        ("xpu", 2, "xpu:1"),
        ("mps", 1, "mps"),
        ("mps", 2, "cpu"),  # gloo cannot send what is on a Mac's GPU
    ],
)
def test_auto_takes_the_accelerator_that_torch_has(name, processes, chosen, accelerator):
    accelerator(name)
    assert choose_device("auto", local_rank=1, processes=processes) == torch.device(chosen)


def test_a_device_that_is_named_is_taken(accelerator):
    accelerator(None)
    assert choose_device("cuda", local_rank=1) == torch.device("cuda:1")
    assert choose_device("cuda:3", local_rank=1) == torch.device("cuda:3")
    assert choose_device("cpu", local_rank=1) == torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "processes", "words"),
    [("cuda", 1, "--device cuda: "), ("meta", 1, "no such device"), ("mps", 2, "--device cpu"), ("gpu", 1, "gpu")],
)
def test_a_device_that_cannot_be_used_is_refused(name, processes, words):
    with pytest.raises(UserError, match=words):
        choose_device(name, processes=processes)


@pytest.mark.parametrize(
    ("answer", "build"), [("580.95, 6.1", "cu126"), ("570.86, 12.0", "cu130"), ("no device", "cu130"), (None, "cu130")]
)
def test_a_card_that_this_torch_has_no_code_for_is_found_before_the_first_step(answer, build, monkeypatch):
    """Memory is allocated on it without an error; a kernel is not run."""

    def no_kernel(device):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors …")

    monkeypatch.setattr(devices, "run_a_kernel", no_kernel)
    monkeypatch.setattr(packages.shutil, "which", lambda name: answer and name)
    monkeypatch.setattr(packages.subprocess, "check_output", lambda *args, **options: answer.encode())
    with pytest.raises(UserError, match=f"no kernel image .*/{build}$"):
        choose_device("cuda")


def test_choosing_a_device_runs_a_kernel_on_it(monkeypatch):
    calls = []
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: calls.append(tensor.device.type))
    choose_device("cpu")
    assert calls == ["cpu"]


# ---------------------------------------------------------------------------------------------------------------- notes


@pytest.fixture
def notes(monkeypatch, capsys):
    """Lets this process print its notes; notes() does so twice and gives what was printed."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ.pop(devices.NOTES, None)
    monkeypatch.setattr(devices, "untested_versions", list)

    def printed() -> str:
        assert capsys.readouterr() == ("", "")
        for _ in range(2):
            print_notes()
        return capsys.readouterr().out

    return printed


@pytest.mark.parametrize(
    ("requested", "cuda", "driver", "words"),
    [
        ("auto", "13.0", True, "no GPU found, although torch is built for CUDA 13.0"),
        ("auto", None, True, "pip install --force-reinstall torch --index-url"),  # PyPI's build for Windows
        ("auto", "13.0", False, ""),
        ("auto", None, False, ""),
        ("cpu", "13.0", True, ""),
    ],
)
def test_an_unused_gpu_is_reported_once_where_a_driver_is_installed(
    requested, cuda, driver, words, monkeypatch, accelerator, notes
):
    accelerator(None)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(devices.shutil, "which", lambda name: name if driver else None)
    monkeypatch.setattr(devices.os.path, "exists", lambda path: False)
    monkeypatch.setattr(subprocess, "check_output", lambda *args, **options: b"610.43, 8.9\n")
    choose_device(requested)
    lines = notes().splitlines()
    assert len(lines) == bool(words)
    assert words in "".join(lines)


def test_versions_that_are_not_tested_are_named_once(monkeypatch, notes, tmp_path):
    monkeypatch.undo()
    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ.pop(devices.NOTES, None)
    pins = tmp_path / "constraints.txt"
    pins.write_text(
        "# comment\ntorch==2.13.0\nnumpy==2.2.6; python_version < '3.11'\nnumpy==2.4.6; python_version >= '3.11'\n"
        "transformers==5.20.2\ntokenizers==1\nsafetensors==1\n"
    )
    installed = {"torch": "2.11.0+cu128", "numpy": "2.1.3", "transformers": "5.20.2", "tokenizers": "1"}

    def version(name: str) -> str:
        if name not in installed:
            raise metadata.PackageNotFoundError
        return installed[name]

    monkeypatch.setattr(packages, "CONSTRAINTS", pins)
    monkeypatch.setattr(metadata, "version", version)
    (line,) = notes().splitlines()
    assert "torch 2.11.0 (tested: 2.13.0), numpy 2.1.3 (tested: 2.2.6 or 2.4.6);" in line
    installed |= {"torch": "2.13.0+cpu", "numpy": "2.4.6"}
    assert packages.untested_versions() == []


def test_the_packages_that_compute_have_tested_versions():
    assert all(packages.CONSTRAINTS.read_text("utf-8").count(f"\n{name}==") for name in packages.COMPUTING)
