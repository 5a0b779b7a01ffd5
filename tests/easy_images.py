"""A few images of one figure's colour with questions, in easy-vqa's layout."""

import json

from PIL import Image


def small_set(folder, count=30):
    """folder/SPLIT/questions.json and images/N.png of both splits; two questions an image tell shape and colour."""
    for split in ("train", "test"):
        (folder / split / "images").mkdir(parents=True, exist_ok=True)
        questions = []
        for image in range(count):
            shape, colour = ("circle", "triangle")[image % 2], ("red", "blue", "teal")[image % 3]
            Image.new("RGB", (8, 8), colour).save(folder / split / "images" / f"{image}.png")
            questions += [[f"what is the {colour} shape?", shape, image], ["what color is the shape?", colour, image]]
        (folder / split / "questions.json").write_text(json.dumps(questions))
    return folder
