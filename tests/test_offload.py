"""`device_map` with parts on the disk: the same logits and gradients, and an adapter that is trained, not lost."""

import pytest
import torch
from conftest import batch, difference, fill, tiny_lavin

from lavin import LavinForConditionalGeneration


PARTS = (
    "model.vision_tower", "model.multi_modal_projector", "model.modality_embedding",
    "model.language_model.embed_tokens", "model.language_model.layers", "model.language_model.norm",
    "model.language_model.rotary_emb", "lm_head",
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A full base, and light folders beside it whose adapters are filled; the second trains the head too."""
    root = tmp_path_factory.mktemp("offload")
    tiny_lavin(adapter=False).save_pretrained(root / "base")
    for name, mma in (("light", {}), ("head", {"modules_to_save": ["lm_head"]})):
        fill(LavinForConditionalGeneration.from_pretrained(root / "base", mma=mma)).save_pretrained(root / name)
    return root


def load(folder, where, tmp_path, **kwargs):
    """A folder with the parts that begin so on the disk."""
    places = {part: "disk" if part.startswith(where) else "cpu" for part in PARTS}
    return LavinForConditionalGeneration.from_pretrained(
        folder, device_map=places, offload_folder=tmp_path / "offload", **kwargs
    ).eval()


@torch.no_grad()
def logits(model):
    return model.eval()(**batch(model.config, (1, 0))).logits


WHERE = {
    "projector": "model.multi_modal_projector",
    "embedding": "model.modality_embedding",
    "head": "lm_head",
    "layers": "model.language_model.layers",
    "all": "",
}


@pytest.mark.parametrize("mma", [None, {}], ids=["inference", "training"])
@pytest.mark.parametrize("part", WHERE)
@pytest.mark.parametrize("name", ["light", "head"])
def test_offloaded_parts_compute_the_same_and_save(folders, tmp_path, name, part, mma):
    expected = logits(LavinForConditionalGeneration.from_pretrained(folders / name))
    model = load(folders / name, WHERE[part], tmp_path, **({} if mma is None else {"mma": mma}))
    assert difference(logits(model), expected) < 1e-6
    base = model if mma is None else model.get_base_model()
    assert not any(parameter.is_meta for key, parameter in base.named_parameters() if ".mma." in key)
    base.save_pretrained(tmp_path / "saved", full=False)
    assert difference(logits(LavinForConditionalGeneration.from_pretrained(tmp_path / "saved")), expected) < 1e-6
    if any(parameter.is_meta for parameter in base.parameters()):
        with pytest.raises(ValueError, match="is offloaded.*save a light folder"):
            base.save_pretrained(tmp_path / "full", full=True)
        assert not (tmp_path / "full").exists()
        for fold in (base.fold, lambda: base.merge_modality("text")):
            with pytest.raises(ValueError, match="offloaded cannot be folded"):
                fold()


@pytest.mark.parametrize("part", ["projector", "layers", "all"])
def test_offloaded_parts_train_the_same(folders, tmp_path, part):
    grads = []
    for where in ("nowhere", WHERE[part]):
        model = load(folders / "light", where, tmp_path, mma={"dropout": 0.1}).eval()
        inputs = batch(model.get_base_model().config, (1, 0))
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad})
    assert grads[0].keys() == grads[1].keys() and all(grad is not None for grad in grads[1].values())
    assert all(difference(grads[1][name], grad) < 1e-5 for name, grad in grads[0].items())


def test_a_base_without_adapter_saves_whole(folders, tmp_path):
    model = load(folders / "base", "", tmp_path)
    model.save_pretrained(tmp_path / "full")
    again = LavinForConditionalGeneration.from_pretrained(tmp_path / "full")
    assert torch.equal(logits(again), logits(LavinForConditionalGeneration.from_pretrained(folders / "base")))


def test_what_cannot_be_trained_offloaded_is_refused(folders, tmp_path):
    with pytest.raises(ValueError, match="multi_modal_projector.* is offloaded"):
        load(folders / "base", "", tmp_path, trainable=["multi_modal_projector"])
    with pytest.raises(ValueError, match="PEFT cannot train .*lora.*offloaded"):
        load(folders / "base", "", tmp_path, peft={"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"]})
    peft = {"peft_type": "LORA", "target_modules": ["q_proj", "v_proj"]}
    model = load(folders / "base", "model.multi_modal_projector", tmp_path, peft=peft)
    assert not any(parameter.is_meta for parameter in model.parameters())
