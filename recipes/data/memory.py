"""
Peak memory of `lavin data` at two sizes of generated data, all of its processes together (Linux only):

    python -m lavin.recipes.data.memory --rows 20000 200000
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from PIL import Image


def make_scienceqa(folder: Path, rows: int) -> list[str]:
    """Writes a ScienceQA of so many questions, one in ten with an image of 32 pixels."""
    draw, words = random.Random(0), "energy force light matter rock plant animal river north south".split()
    problems, captions = {}, {}
    for number in range(1, rows + 1):
        pid, has_image = str(number), number % 10 == 0
        problems[pid] = {
            "question": " ".join(draw.choices(words, k=12)), "choices": draw.sample(words, 4), "answer": number % 4,
            "hint": " ".join(draw.choices(words, k=20)), "image": "image.png" if has_image else None,
            "task": "closed choice", "grade": "grade3", "subject": "natural science", "topic": "t", "category": "c",
            "skill": "s", "lecture": " ".join(draw.choices(words, k=80)),
            "solution": " ".join(draw.choices(words, k=40)), "split": "train",
        }  # fmt: skip
        if has_image:
            captions[pid] = " ".join(draw.choices(words, k=9))
            path = folder / "images" / "train" / pid / "image.png"
            path.parent.mkdir(parents=True)
            Image.new("RGB", (32, 32), (number % 256, number // 256 % 256, 0)).save(path)
    contents = {"problems": problems, "pid_splits": {"train": list(problems)}, "captions": {"captions": captions}}
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return ["scienceqa", "--root", str(folder), "--captions"]


def make_instructions(folder: Path, rows: int) -> list[str]:
    """Writes LLaVA-Instruct talks of two answers, so many answers in all, half of the talks with an image."""
    draw, words = random.Random(0), "what where who cat dog tree house red blue green man woman street".split()
    for number in range(1000):
        path = folder / "images" / f"{number:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((48, 48), 60).save(path)
    with open(folder / "llava.json", "w") as file:
        for number in range(rows // 2):
            said = [" ".join(draw.choices(words, k=k)) for k in (10, 60, 10, 60)]
            entry = {"id": f"{number:012}"}
            if number % 2:
                entry["image"], said[0] = f"{number % 1000:03}.jpg", f"<image>\n{said[0]}"
            entry["conversations"] = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]
            file.write(("[" if number == 0 else ",\n") + json.dumps(entry))
        file.write("]")
    return ["instructions", "--input", str(folder / "llava.json"), "--image-root", str(folder / "images")]


def used(pid: int) -> tuple[int, int]:
    """
    The memory of a process in kB: its own (anonymous), and the pages of files that it has mapped.

    A page that several processes share is divided among them. The kernel drops pages of files, such as those of
    Arrow's tables, when anybody wants the memory.
    """
    lines = dict(line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return tuple(int(lines[name].split()[0]) for name in ("Pss_Anon", "Pss_File"))


def peak(arguments: list[str]) -> tuple[float, float, float]:
    """
    Runs `lavin data` and watches it.

    Returns:
        `tuple[float, float, float]`: of all its processes together, the most memory of their own and the most pages of
            files, in MB; the seconds.
    """
    start, highest = time.time(), np.zeros(2)
    command = [sys.executable, "-m", "lavin.recipes.cli", "data", *arguments]
    process = psutil.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        total = np.zeros(2)
        try:
            for one in [process, *process.children(recursive=True)]:
                total += used(one.pid)
        except (psutil.NoSuchProcess, OSError, KeyError):  # it has just ended
            pass
        highest = np.maximum(highest, total)
        time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"`lavin data {' '.join(arguments)}` ended with {process.returncode}.")
    return *(highest * 1024 / 1e6), time.time() - start


def main(arguments: list[str] | None = None) -> list[dict]:
    """Measures each command at each size; prints a table."""
    parser = argparse.ArgumentParser(prog="python -m lavin.recipes.data.memory", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[20000, 200000], metavar="N")
    parser.add_argument("--kinds", nargs="+", default=["scienceqa", "instructions"], metavar="KIND")
    parser.add_argument("--num-proc", type=int, default=2, metavar="N")
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="where the data goes for a while; a temporary folder"
    )
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args(arguments)
    if sys.platform != "linux":
        raise SystemExit("This is measured on Linux alone: it reads /proc.")
    makers = {"scienceqa": make_scienceqa, "instructions": make_instructions}
    results = []
    for kind in options.kinds:
        for rows in options.rows:
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                made = makers[kind](Path(folder), rows)
                output = Path(folder, "rows")
                own, mapped, seconds = peak([*made, "--output", str(output), "--num-proc", str(options.num_proc)])
                size = sum(path.stat().st_size for path in output.iterdir()) / 1e6
            results.append({"kind": kind, "rows": rows, "peak_mb": round(own), "mapped_mb": round(mapped),
                            "seconds": round(seconds, 1), "parquet_mb": round(size, 1)})  # fmt: skip
    print(f"{'command':14}{'rows':>10}{'peak MB':>10}{'ratio':>8}{'mapped MB':>11}{'seconds':>10}{'Parquet MB':>12}")
    for entry in results:
        first = next(other for other in results if other["kind"] == entry["kind"])
        ratio = entry["peak_mb"] / first["peak_mb"]
        print(f"{entry['kind']:14}{entry['rows']:10,}{entry['peak_mb']:10,}{ratio:8.2f}{entry['mapped_mb']:11,}"
              f"{entry['seconds']:10.1f}{entry['parquet_mb']:12.1f}")  # fmt: skip
    if options.json:
        print(json.dumps(results))
    return results


if __name__ == "__main__":
    main()
