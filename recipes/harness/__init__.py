"""LaVIN in lmms-eval: the model by its entry-point group `lmms_eval.models`, ScienceQA by `--include_path`."""

from pathlib import Path


TASKS = Path(__file__).parent / "tasks"  # for `--include_path`


def manifest():
    """What the entry point `lavin` of the group `lmms_eval.models` gives: where the model class is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="lavin", simple_class_path="lavin.recipes.harness.lmms.Lavin")
