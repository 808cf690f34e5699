"""Kills, full and read-only disks, no network, no memory: what was there stays, and the message says what to do."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import VOCAB
from faults import chat, folder, happened, inputs_of, lavin, refused  # noqa: F401
from test_serve_batch import Numbers, ask, failing, model, offline, run, text_of  # noqa: F401
from training import small_disk  # noqa: F401
from transformers import AutoModel

from lavin.recipes.cli import main
from lavin.recipes.evaluate.answers import answer
from lavin.recipes.evaluate.letters import letter_batches
from lavin.recipes.load import load_model
from lavin.recipes.serve.batch import Ended
from lavin.recipes.serve.batcher import Batcher


AREA = "machine"
IDS = torch.tensor([[1, 5, 6, 7]])
ADAPTER = "mma/adapter_model.safetensors"


def logits(loaded) -> torch.Tensor:
    with torch.no_grad():
        return loaded.eval()(input_ids=IDS).logits


SAVES = """
    import os, random, shutil, signal, sys, time
    import torch
    from pathlib import Path
    from transformers import AutoModel
    import lavin
    from lavin.files_lavin import read_adapter

    model, folder = AutoModel.from_pretrained(sys.argv[1]), Path(sys.argv[2])
    parameters = [p for n, p in model.named_parameters() if ".mma." in n]

    def save(value):
        with torch.no_grad():
            for parameter in parameters:
                parameter.fill_(value)
        model.save_pretrained(folder)

    def stored():
        tensors = read_adapter(folder / "mma" / "adapter_model.safetensors").values()
        values = {number for tensor in tensors for number in tensor.unique().tolist()}
        assert len(values) == 1, values
        return values.pop()

    def forked(work):
        child = os.fork()
        if child == 0:
            try:
                work()
                os._exit(0)
            finally:
                os._exit(1)
        return child

    def for_ever(first):
        while True:
            first += 1
            save(first)

    save(0.0)
    random.seed(0)
    seen, killed_within = set(), 0
    for number in range(1, 21):
        child = forked(lambda: for_ever(1000.0 * number))
        while not list(folder.glob("_saving-*")):  # it has begun
            time.sleep(0.0005)
        time.sleep(number % 2 * random.uniform(0, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        left = list(folder.glob("_saving-*"))
        killed_within += len(left)
        for place in left:
            shutil.rmtree(place)
        seen.add(stored())
        if number % 5 == 0:
            AutoModel.from_pretrained(folder)
    print("killed", len(seen), killed_within)

    children = [forked(lambda: [save(1000.0 * who + i) for i in range(15)]) for who in (50, 60, 70)]
    for _ in range(100):
        stored()
        time.sleep(0.01)
    codes = [os.waitpid(child, 0)[1] for child in children]
    assert codes == [0, 0, 0], codes
    print("at once", stored() % 1000)
    AutoModel.from_pretrained(folder)
"""


@pytest.mark.slow
def test_killed_while_saving_and_two_at_once(folder, tmp_path):  # noqa: F811
    """Whatever moment it dies at, the folder loads, and its adapter is one that was saved, to the last byte."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SAVES), str(folder), str(tmp_path / "out")],
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    different, within = map(int, re.search(r"killed (\d+) (\d+)", done.stdout).groups())
    assert different > 1 and within > 0, "no kill fell into a save"
    happened(AREA, "SIGKILL while saving, 20 times", "a whole adapter each time, the old or the new one; it loads")
    assert "at once 14" in done.stdout
    happened(AREA, "three processes save into one folder at once", "no error; a whole adapter of one of them")


def test_disk_full_while_saving(folder, small_disk):  # noqa: F811
    where = small_disk / "out"
    loaded = AutoModel.from_pretrained(folder)
    loaded.save_pretrained(where)
    expected, files = logits(loaded), sorted(where.rglob("*"))
    content = {file: file.read_bytes() for file in files if file.is_file()}
    with torch.no_grad():
        for name, parameter in loaded.named_parameters():
            if ".mma." in name:
                parameter.mul_(2)
    with pytest.raises(OSError), open(small_disk / "filler", "wb", buffering=0) as filler:
        while True:
            filler.write(bytes(2**12))
    with refused(AREA, "disk full while saving", "No space left on device", OSError):
        loaded.save_pretrained(where)
    assert sorted(where.rglob("*")) == files and all(file.read_bytes() == content[file] for file in content)
    assert torch.equal(logits(AutoModel.from_pretrained(where)), expected)
    (small_disk / "filler").unlink()
    loaded.save_pretrained(where)
    assert torch.equal(logits(AutoModel.from_pretrained(where)), logits(loaded))


PUSH = """
    import sys
    from huggingface_hub import HfApi
    for name, folder in eval(sys.argv[1]).items():
        HfApi().create_repo(name, exist_ok=True)
        print(HfApi().upload_folder(repo_id=name, folder_path=folder).oid)
"""
PARTS = """
    import os, sys
    from lavin.recipes.cli import main
    from pathlib import Path
    cache = Path(os.environ["HF_HOME"], "hub")
    for repository, file in eval(sys.argv[1]):
        path = next(cache.glob(f"models--{repository.replace('/', '--')}/snapshots/*/{file}"))
        kept = path.read_bytes()
        path.unlink()
        print(file, main(["ask", "m/lavin", "What?", "--max-new-tokens", "2"]), file=sys.stderr)
        path.write_bytes(kept)
"""


def code(text: str, *arguments, **environment) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text), *map(str, arguments)], capture_output=True, text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.slow
def test_without_network_and_with_a_read_only_cache(hub, pair, folder, tmp_path, small_disk):  # noqa: F811
    home = {"HF_HOME": str(small_disk)}
    pushed = code(PUSH, {"m/vision": str(pair / "vision"), "m/text": str(pair / "text")}, **hub, **home)
    light = Path(shutil.copytree(folder, tmp_path / "light"))
    config = json.loads((light / "config.json").read_text())
    for kind, commit in zip(("vision", "text"), pushed.stdout.split(), strict=True):
        config[f"{kind}_checkpoint"] = {"name": f"m/{kind}", "revision": commit}
    (light / "config.json").write_text(json.dumps(config))
    code(PUSH, {"m/lavin": str(light)}, **hub, **home)
    shutil.rmtree(small_disk / "hub", ignore_errors=True)

    question = ["ask", "m/lavin", "What is this?", "--max-new-tokens", "3"]
    online = lavin(*question, **hub, **home)
    assert online.returncode == 0, online.stderr[-2000:]
    dead = {**hub, "HF_ENDPOINT": "http://127.0.0.1:9"}
    for what, environment in (("offline", {"HF_HUB_OFFLINE": "1"}), ("the network down", dead)):
        warm = lavin(*question, **{**environment, **home})
        assert warm.returncode == 0 and warm.stdout == online.stdout, warm.stderr[-2000:]
        happened(AREA, f"{what}, warm cache", "answers as before")
    cold = lavin(*question, HF_HOME=str(tmp_path / "cold"))
    said = cold.stderr.strip().splitlines()[-1]
    assert cold.returncode == 2 and "config.json of m/lavin is not in the cache" in said, cold.stderr[-2000:]
    assert "HF_HUB_OFFLINE is set" in said and "`hf download m/lavin` gets all there is" in said
    happened(AREA, "offline, cold cache", "exit code 2: " + said.partition("error: ")[2])

    # A part of it only. Without the adapter above all, or the answers would be the bare base's.
    text = f"`hf download m/text --revision {config['text_checkpoint']['revision']}`"
    own = (ADAPTER, "mma/adapter_config.json", "config.json", "processor_config.json", "tokenizer.json")
    missing = [*(("m/lavin", file, "`hf download m/lavin`") for file in own), ("m/text", "model.safetensors", text)]
    done = code(PARTS, [part[:2] for part in missing], HF_HUB_OFFLINE="1", **home)
    lines = done.stderr.splitlines()
    for repository, file, way_out in missing:
        assert f"{file} 2" in lines, done.stderr[-3000:]
        said = lines[lines.index(f"{file} 2") - 1]
        assert f"{file} of {repository} is not in the cache" in said and way_out in said, said
        happened(AREA, f"offline, {file} not in the cache", "exit code 2: " + said.partition("error: ")[2])

    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    read_only = lavin(*question, **hub, **home)
    assert read_only.returncode == 0 and read_only.stdout == online.stdout, read_only.stderr[-2000:]
    happened(AREA, "read-only cache", "answers as before")


def full_from(rows: int, forward):
    """A forward whose memory holds fewer rows than this."""

    def limited(*args, **kwargs):
        first = kwargs.get("input_ids", args[0] if args else None)
        if first is not None and len(first) >= rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
        return forward(*args, **kwargs)

    return limited


def test_out_of_memory_in_our_own_batches(folder, monkeypatch, capsys):  # noqa: F811
    """`lavin eval`, `ask` and lmms-eval: the batch is halved until it fits; the answers are the same."""
    loaded, processor = load_model(folder, "cpu")
    prompts = [f"What is {'very ' * i}this?" for i in range(11)]
    expected = answer(loaded, processor, prompts, batch_size=8, max_new_tokens=4)
    monkeypatch.setattr("lavin.recipes.evaluate.letters.letter_tokens", lambda *_: ([5], [6, 7, 8]))
    scores = dict(pair for rows, found in letter_batches(loaded, processor, prompts, [[]] * 11, [3] * 11, 8)
                  for pair in zip(rows, found, strict=True))  # fmt: skip
    capsys.readouterr()
    own = loaded.forward
    monkeypatch.setattr(loaded, "forward", full_from(3, own))
    assert answer(loaded, processor, prompts, batch_size=8, max_new_tokens=4) == expected
    said = capsys.readouterr().err
    assert "does not hold 8 questions at once: going on with 4" in said and "going on with 2" in said
    assert said.count("going on") == 2
    found = dict(pair for rows, found in letter_batches(loaded, processor, prompts, [[]] * 11, [3] * 11, 8)
                 for pair in zip(rows, found, strict=True))  # fmt: skip
    assert torch.allclose(torch.tensor([found[i] for i in range(11)]), torch.tensor([scores[i] for i in range(11)]))
    happened(AREA, "out of memory in `lavin eval`", "the batch is halved until it fits, with a line; same answers")
    monkeypatch.setattr(loaded, "forward", full_from(1, own))
    with refused(AREA, "out of memory with a single question", r"single question of \d+ tokens .*choose a smaller"):
        answer(loaded, processor, prompts[:1])
    monkeypatch.setattr("lavin.recipes.ask.load_model", lambda *args: (loaded, processor))
    assert main(["ask", str(folder), "What?"]) == 2 and "does not hold a single" in capsys.readouterr().err
    inputs = inputs_of(processor, chat("What?"))
    with pytest.raises(torch.OutOfMemoryError):  # a library's call does not change what it was asked for
        loaded.generate(**inputs, max_new_tokens=2)
    monkeypatch.setattr(loaded, "forward", own)
    assert answer(loaded, processor, prompts, batch_size=8, max_new_tokens=4) == expected, "nothing is left behind"
    happened(AREA, "out of memory in `model.generate`", "torch.OutOfMemoryError, and the next call answers as before")


@pytest.mark.parametrize("at", ["prefill", "step", "join"])
def test_out_of_memory_in_the_server(model, monkeypatch, at):  # noqa: F811
    """Rows that do not fit beside each other are answered with fewer at once; what was sent is not sent again."""
    asked = [ask(model.config, n % 3, 9, n, new=8) for n in range(6)]
    expected = [offline(model, row) for row, _ in asked]
    batcher = Batcher(model, set())
    own, widest = model.forward, 0

    def limited(**kwargs):
        nonlocal widest
        rows, is_step = kwargs["input_ids"].shape[0], kwargs["input_ids"].shape[1] == 1
        if rows >= (3 if at != "join" else 99) and is_step == (at == "step"):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        widest = max(widest, rows)
        return own(**kwargs)

    monkeypatch.setattr(model, "forward", limited)
    if at == "join":
        from lavin.recipes.serve import batch as batch_module

        stacked = batch_module.stacked

        def small(first, second):
            if len(first) + len(second) >= 3:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return stacked(first, second)

        monkeypatch.setattr(batch_module, "stacked", small)
        for row, _ in asked:
            batcher.submit(row)
            batcher.step()
        run(batcher, [])
    else:
        run(batcher, [row for row, _ in asked])
    assert [row.tokens for row, _ in asked] == expected
    for row, events in asked:
        assert events[-1] == Ended("length") and text_of(events) == Numbers().decode(row.tokens, True).strip()
    assert batcher.batch is None and not batcher.waiting and not batcher.starting
    happened(AREA, f"out of memory in `lavin serve`, {at}", "fewer rows at once; every answer whole and the same")


def test_one_row_that_never_fits_fails_alone(model, monkeypatch):  # noqa: F811
    good, bad = [ask(model.config, n, 9, n, new=6) for n in (0, 1)], ask(model.config, 0, 9, 5, new=6)
    expected = [offline(model, row) for row, _ in good]
    bad[0].input_ids[3] = VOCAB - 1
    failing(monkeypatch, model, lambda ids: (ids == VOCAB - 1).any(), torch.OutOfMemoryError("out of memory"))
    batcher = Batcher(model, set())
    run(batcher, [good[0][0], bad[0], good[1][0]])
    assert [row.tokens for row, _ in good] == expected
    assert len(bad[1]) == 1 and bad[1][0].status == 500 and "ran out of memory" in bad[1][0].message
