"""Runs of recipes, each in a process of its own, one after the other; finished ones are kept."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import yaml
from tqdm import tqdm


RESULT = "result.json"
LOG = "log.txt"


@dataclass
class Run:
    """
    Args:
        folder (`Path`): Where it is written. Its name is the run's.
        recipes (`list[dict]`): Settings of `trl sft`, of its segments in their order; mostly one.
        data (`Path`): The questions, in ScienceQA's format.
        split (`str`): Which of them are asked.
    """

    folder: Path
    recipes: list[dict]
    data: Path
    split: str = "test"

    @property
    def steps(self) -> int:
        return sum(recipe["max_steps"] for recipe in self.recipes)

    def finished(self) -> dict | None:
        """The result, if it was made with these settings."""
        path = self.folder / RESULT
        result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        same = result is not None and (result.get("recipes"), result["split"]) == (self.recipes, self.split)
        return result if same else None

    def check_place(self):
        """
        Raises:
            `ValueError`: if the folder holds another run that is finished, or what no run of this kind has written.
        """
        if (self.folder / RESULT).is_file():
            what = "a finished run with other settings or of another question set"
        elif self.folder.is_dir() and any(self.folder.iterdir()) and not (self.folder / LOG).is_file():
            what = "something else"
        else:
            return
        raise ValueError(f"{self.folder} holds {what}. Name another folder with `--output`, or remove this one.")

    def start(self) -> subprocess.Popen:
        """Starts it in a process group of its own, which ends when the pipe to it closes: with this process."""
        self.check_place()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        for number, recipe in enumerate(self.recipes, 1):
            text = yaml.safe_dump(recipe, sort_keys=False)
            (self.folder / f"{number}.yaml").write_text(text, encoding="utf-8")
        command = [sys.executable, "-m", "lavin.recipes.compare.one", str(self.folder), str(self.data), self.split]
        environment = {"OMP_NUM_THREADS": "1", **os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        with open(self.folder / LOG, "wb") as log:
            return subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True,
            )  # fmt: skip

    def steps_done(self) -> int:
        """Optimiser steps that the progress bars in its log show."""
        text, done = (self.folder / LOG).read_text(encoding="utf-8", errors="replace"), 0
        for steps in {recipe["max_steps"] for recipe in self.recipes}:
            shown = [int(found) for found in re.findall(rf"(?<!\d)(\d+)/{steps} \[", text)]
            # A bar that begins anew is the next segment's.
            done += sum(a for a, b in zip(shown, shown[1:] + [-1], strict=False) if b < a)
        return min(done, self.steps)


def run_all(runs: list[Run]) -> list[dict]:
    """
    Makes the runs that have not been made, one after the other, with one progress bar.

    Returns:
        `list[dict]`: the results of all.

    Raises:
        `OSError`: if a run fails; what was finished is kept.
        `ValueError`: if a run's folder holds something else; none has been started then.
    """
    waiting = [run for run in runs if run.finished() is None]
    for run in waiting:
        run.check_place()
    print(f"{len(runs)} runs, {len(runs) - len(waiting)} of them finished before", flush=True)
    done = 0
    with tqdm(total=sum(run.steps for run in waiting), unit="step", disable=not waiting) as bar:
        for run in waiting:
            bar.set_postfix_str(run.folder.name)
            process = run.start()
            try:
                while process.poll() is None:
                    time.sleep(0.5)
                    bar.update(done + run.steps_done() - bar.n)
            finally:
                process.stdin.close()
            if process.returncode:
                log = run.folder / LOG
                end = "\n".join(re.split(r"[\r\n]+", log.read_text(errors="replace").strip())[-15:])
                raise OSError(
                    f"The run {run.folder.name} failed:\n{end}\n\nIts whole log: {log}. Finished runs are kept: the "
                    "same command goes on from here."
                )
            done += run.steps
            bar.update(done - bar.n)
            tqdm.write(one_line(run.folder.name, run.finished()))
    return [run.finished() for run in runs]


def one_line(name: str, result: dict) -> str:
    """One finished run, for people."""
    scores = "  ".join(f"{column} {result['scores'][column]:.1f}" for column in ("IMG", "TXT", "NO", "AVG"))
    rates = ", ".join(f"{recipe['learning_rate']:g}" for recipe in result["recipes"] if recipe["max_steps"])
    return f"{name}: {scores}  text ability {result['text']['skill']:.1f}  learning rate {rates or '-'}"
