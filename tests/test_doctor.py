"""`lavin doctor`: what is fine is green, what is broken red, and what is optional and absent grey."""

import http.server
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import test_doctor_folder
import torch
from huggingface_hub import constants
from test_doctor_folder import WEIGHTS, failed, truncate

from lavin import LavinForConditionalGeneration
from lavin.recipes.doctor import hub as hub_check
from lavin.recipes.doctor import machine, tiny, trl_sft, versions
from lavin.recipes.doctor.report import FAIL, OK, SKIP, WARN, Finding, Line, examine, lines_of


folders, copied = test_doctor_folder.folders, test_doctor_folder.copied


def fake_versions(monkeypatch, **installed):
    real = importlib.metadata.version

    def version(name):
        if installed.get(name, "") is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed.get(name) or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    return {line.name: line for line in versions.check_versions()}


def test_versions_are_compared_with_what_lavin_declares(monkeypatch):
    assert FAIL not in {line.status for line in versions.check_versions()}
    lines = fake_versions(monkeypatch, transformers="4.57.0", peft=None, trl="0.9.0", bitsandbytes=None)
    declared = [text for text in importlib.metadata.requires("lavin") if text.startswith("transformers")]
    assert (
        lines["transformers"].status == FAIL
        and f'`pip install -c constraints.txt "{declared[0]}"`' in lines["transformers"].do
    )
    assert lines["peft"].status == FAIL and lines["peft"].found == "not installed"
    assert lines["trl"].status == FAIL and "trl" in lines["trl"].do
    assert lines["extra gpu"].status == SKIP and "not installed: bitsandbytes" in lines["extra gpu"].found
    assert lines["torch"].status == OK
    monkeypatch.setattr("platform.python_version", lambda: "3.9.1")
    assert next(versions.check_versions()).status == FAIL


def broken():
    yield Line(OK, "first", "fine")
    raise RuntimeError("no such luck")


def leaving():
    sys.exit(3)


def test_an_error_in_one_check_does_not_stop_the_others(capsys):
    checks = [(f.__name__, f, "Mend it.") for f in (broken, leaving)]
    assert examine([*checks, ("after", lambda: "fine", "")]) == 1
    words = capsys.readouterr().out
    assert "RuntimeError: no such luck" in words and "SystemExit: 3" in words and words.count("Do: Mend it.") == 2
    assert re.search(r"^OK .*first.*fine$", words, flags=re.M) and re.search(r"^OK .*after.*fine$", words, flags=re.M)
    assert "2 failed, 2 fine" in words and "\033" not in words
    limited = ("limited", lambda: [Line(WARN, "x", "small", "More."), Line(SKIP, "y", "none")], "")
    assert examine([limited]) == 0  # neither is a failure


def absent():
    raise Finding(SKIP, "none")


def small():
    raise Finding(WARN, "small", "More.")


def test_what_a_check_finds_is_a_line():
    """A way out is its own, or the check's; who skips needs none."""
    for run, own in [(absent, ""), (small, "More.")]:
        (line,) = lines_of("x", run, "Mend it.")
        assert (line.name, line.do) == ("x", own)
    (line,) = lines_of("x", lambda: tiny.Tiny().forward(), "Mend it.")
    assert line.status == SKIP and "not tried" in line.found and not line.do


def test_colour_on_a_terminal_only(capsys, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    examine([("broken", broken, "Mend it.")])
    words = capsys.readouterr().out
    assert "\033[32mOK  \033[0m" in words and "\033[31mFAIL\033[0m" in words
    monkeypatch.setenv("NO_COLOR", "1")
    examine([("broken", broken, "Mend it.")])
    assert "\033" not in capsys.readouterr().out


@pytest.fixture
def server(monkeypatch):
    """Something that answers as the Hub, with the status and after the time that it is given."""
    answer = SimpleNamespace(status=200, seconds=0.0)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            time.sleep(answer.seconds)
            self.send_response(answer.status)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{running.server_port}")
        yield answer
        running.shutdown()


def hub_line() -> Line:
    return line_of(lambda: hub_check.check_hub(None))


def line_of(check, do="Mend it.") -> Line:
    (line,) = lines_of("x", check, do)
    return line


def test_the_hub(server, monkeypatch):
    assert hub_line().status == OK
    server.status = 503
    assert hub_line().status == FAIL and "503" in hub_line().found
    server.status, server.seconds = 200, 3
    monkeypatch.setattr(hub_check, "PATIENCE", 0.3)
    assert hub_line().status == FAIL
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert hub_line().status == FAIL and "HF_HUB_OFFLINE=1" in hub_line().do
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub_line().status == SKIP and "by choice" in hub_line().found


def test_cache_and_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "new" / "cache"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**40))
    assert line_of(machine.check_cache).status == OK and not list(tmp_path.iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5 * 2**30))
    assert line_of(machine.check_cache).status == WARN
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=2**20))
    assert line_of(machine.check_cache).status == line_of(machine.check_disk).status == FAIL
    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    line = line_of(machine.check_cache)
    assert line.status == FAIL and "export HF_HUB_CACHE=DIR" in line.do


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
def test_a_gpu_that_pytorch_cannot_use_is_red_and_none_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert line_of(machine.check_gpu).status == SKIP
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: Tesla (UUID: GPU-1)'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    line = line_of(machine.check_gpu)
    assert line.status == FAIL and "GPU 0: Tesla is there" in line.found and "CUDA build" in line.do
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden by choice
    assert line_of(machine.check_gpu).status == SKIP


def test_what_is_optional_is_grey_where_it_is_absent_and_red_where_it_is_broken(tmp_path, monkeypatch):
    check = "flash attention", lambda: machine.check_flash(tiny.Tiny()), machine.FLASH_AGAIN
    if "flash_attn" not in sys.modules and machine.find_spec("flash_attn") is None:
        assert [line.status for line in lines_of(*check)] == [SKIP]
        (tmp_path / "flash_attn.py").write_text("raise ImportError('undefined symbol: _ZN3c10')")
        monkeypatch.syspath_prepend(tmp_path)
        (line,) = lines_of(*check)
        assert line.status == FAIL and "undefined symbol" in line.found and "no-build-isolation" in line.do
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    monkeypatch.setattr(trl_sft, "find_spec", lambda name: None)
    checks = [check[1], lambda: machine.check_4bit(tiny.Tiny()), machine.check_deepspeed]
    checks.append(lambda: trl_sft.check_trl(None))
    assert [line_of(one).status for one in checks] == [SKIP] * 4


def test_the_tiny_model_shows_what_is_broken(monkeypatch, tmp_path):
    def tiny_lines() -> dict[str, Line]:
        model, place = tiny.Tiny(), tmp_path / str(len(list(tmp_path.iterdir())))
        place.mkdir()
        steps = {"tiny model": lambda: model.build(place), "forward": model.forward, "backward": model.backward}
        steps |= {"generate": model.generate, "save and load": model.save_and_load}
        return {name: Line(line.status, name, line.found) for name, step in steps.items() if (line := line_of(step))}

    assert {line.status for line in tiny_lines().values()} == {OK}
    with monkeypatch.context() as patch:  # images that reach nobody
        real = LavinForConditionalGeneration.forward
        patch.setattr(
            LavinForConditionalGeneration,
            "forward",
            lambda self, *a, pixel_values=None, **k: real(
                self, *a, pixel_values=None if pixel_values is None else pixel_values * 0, **k
            ),
        )
        lines = tiny_lines()
        assert failed(lines.values()).keys() == {"forward"} and "same logits" in lines["forward"].found
    with monkeypatch.context() as patch:  # an adapter that is not loaded
        patch.setattr("lavin.peft_lavin.set_adapter_weights", lambda *arguments: None)
        assert failed(tiny_lines().values()).keys() == {"save and load"}
    monkeypatch.setattr(tiny, "TOWERS", Path("nowhere"))
    lines = tiny_lines()
    assert failed(lines.values()).keys() == {"tiny model"}
    assert {line.status for name, line in lines.items() if name != "tiny model"} == {SKIP}


@pytest.mark.slow
def test_trl_sft_that_cannot_load_the_folder_is_red(copied):
    folder = copied("trained")
    (folder / "tuner_lavin.py").write_text("raise RuntimeError('damaged code')")
    process = trl_sft.start_trl(folder)
    line = line_of(lambda: trl_sft.check_trl(process))
    assert line.status == FAIL and "damaged code" in line.found


@pytest.mark.slow
def test_the_command_in_a_fresh_process(folders, copied, tmp_path):
    """Every line of the issue is there and none is red; it leaves nothing behind."""
    (tmp_path / "tmp").mkdir()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path / "tmp")}
    environment["HF_HOME"] = str(tmp_path / "home")
    lavin = [str(Path(sys.executable).with_name("lavin")), "doctor"]

    def call(*arguments):
        return subprocess.run([*lavin, *map(str, arguments)], capture_output=True, text=True, env=environment)

    done = call()
    assert done.returncode == 0, done.stdout + done.stderr
    names = {line[6:23].strip() for line in done.stdout.splitlines()}
    assert {"python", "torch", "transformers", "peft", "extra train", "forward", "backward", "generate"} <= names
    assert {"save and load", "GPU", "bf16", "flash attention", "4-bit", "DeepSpeed", "cache", "disk", "Hub"} <= names
    assert re.search(r"^OK .*trl sft .*LavinPeftModel$", done.stdout, flags=re.M)
    assert "FAIL" not in done.stdout and "\033" not in done.stdout and "All fine" in done.stdout
    assert not [p for p in (tmp_path / "tmp").iterdir() if p.name.startswith("lavin")]
    assert not (tmp_path / "home" / "modules").exists()
    assert call("--model", folders / "trained").returncode == 0
    folder = copied("trained")
    truncate(folder / WEIGHTS)
    done = call("--model", folder)
    assert done.returncode == 1 and "FAIL  adapter" in done.stdout and "Do: Copy" in done.stdout
