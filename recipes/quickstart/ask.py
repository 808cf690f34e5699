"""
Loads a LaVIN folder the way anybody would, and answers questions. It needs nothing of this package but the folder.

    python ask.py FOLDER QUESTIONS.json
"""

import json
import sys

import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor


def ask(folder: str, questions: list[dict]) -> list[str]:
    """
    Answers questions one by one.

    Args:
        folder (`str`): A LaVIN folder or Hub name.
        questions (`list[dict]`): Each with a `prompt` and the path of an `image`, or `None`.

    Returns:
        `list[str]`: the answers.
    """
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    answers = []
    for question in questions:
        content = [{"type": "image", "image": Image.open(question["image"])}] if question["image"] else []
        content.append({"type": "text", "text": question["prompt"]})
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        output = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :]
        answers.append(processor.decode(new, skip_special_tokens=True).strip())
    return answers


if __name__ == "__main__":
    torch.set_num_threads(1)
    with open(sys.argv[2], encoding="utf-8") as file:
        questions = json.load(file)
    for question, reply in zip(questions, ask(sys.argv[1], questions), strict=True):
        picture = f"image {question['image']}\n" if question["image"] else ""
        print(f"\n{picture}{question['prompt']} {reply}")
        if question.get("expected"):
            print(f"(right is: {question['expected']})")
