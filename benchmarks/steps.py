"""Steps from a folder of class folders to labels of other pictures, counted: `python benchmarks/steps.py`.

Each program is the shortest that follows the tool's own documentation (named beside it): a pretrained ResNet, or what
the tool has for one, fine-tuned on `bees/`, then the labels of the pictures in `photos/`. Counted are statements, those
inside functions too, with imports and without, and commands. The programs of other tools were not run here.
"""

import ast

PYTHON = {
    "jft": (
        "README",
        """
import jft
run = jft.finetune(data="bees/", model="resnet18", plan="lp-ft")
rows = run.predict("photos/")
""",
    ),
    "fastai": (
        "docs.fast.ai, Computer vision intro, and Learner.get_preds",
        """
from fastai.vision.all import *
dls = ImageDataLoaders.from_folder("bees", valid_pct=0.2, item_tfms=Resize(224))
learn = vision_learner(dls, resnet18, metrics=accuracy)
learn.fine_tune(3)
probs, _ = learn.get_preds(dl=dls.test_dl(get_image_files("photos")))
rows = [dls.vocab[i] for i in probs.argmax(1)]
""",
    ),
    "Ultralytics": (
        "docs.ultralytics.com, Classify",
        """
from ultralytics import YOLO
model = YOLO("yolo11n-cls.pt")
model.train(data="bees", epochs=10, imgsz=224)
rows = [r.names[r.probs.top1] for r in model("photos")]
""",
    ),
    "Keras": (
        "keras.io, Transfer learning & fine-tuning",
        """
import keras
import numpy as np
train, val = keras.utils.image_dataset_from_directory(
    "bees", validation_split=0.2, subset="both", seed=0, image_size=(224, 224))
names = train.class_names
base = keras.applications.ResNet50(weights="imagenet", include_top=False, input_shape=(224, 224, 3))
base.trainable = False
inputs = keras.Input(shape=(224, 224, 3))
x = keras.applications.resnet.preprocess_input(inputs)
x = base(x, training=False)
x = keras.layers.GlobalAveragePooling2D()(x)
outputs = keras.layers.Dense(len(names))(x)
model = keras.Model(inputs, outputs)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(keras.optimizers.Adam(), loss, metrics=["accuracy"])
model.fit(train, epochs=5, validation_data=val)
base.trainable = True
model.compile(keras.optimizers.Adam(1e-5), loss, metrics=["accuracy"])
model.fit(train, epochs=5, validation_data=val)
photos = keras.utils.image_dataset_from_directory("photos", labels=None, shuffle=False, image_size=(224, 224))
rows = [names[i] for i in np.argmax(model.predict(photos), axis=1)]
""",
    ),
    "Transformers Trainer": (
        "huggingface.co/docs/transformers, Image classification",
        """
from datasets import load_dataset
from torchvision.transforms import Compose, Normalize, RandomResizedCrop, ToTensor
from transformers import (AutoImageProcessor, AutoModelForImageClassification, DefaultDataCollator, Trainer,
    TrainingArguments, pipeline)
data = load_dataset("imagefolder", data_dir="bees", split="train").train_test_split(0.2)
labels = data["train"].features["label"].names
processor = AutoImageProcessor.from_pretrained("microsoft/resnet-50")
size = processor.size["shortest_edge"]
steps = Compose([RandomResizedCrop(size), ToTensor(), Normalize(processor.image_mean, processor.image_std)])
def transforms(examples):
    examples["pixel_values"] = [steps(image.convert("RGB")) for image in examples["image"]]
    del examples["image"]
    return examples
data = data.with_transform(transforms)
model = AutoModelForImageClassification.from_pretrained("microsoft/resnet-50", num_labels=len(labels),
    id2label=dict(enumerate(labels)), label2id={l: i for i, l in enumerate(labels)}, ignore_mismatched_sizes=True)
args = TrainingArguments("run", remove_unused_columns=False, eval_strategy="epoch", num_train_epochs=3)
trainer = Trainer(model, args, data_collator=DefaultDataCollator(), train_dataset=data["train"],
    eval_dataset=data["test"], processing_class=processor)
trainer.train()
trainer.save_model("model")
classify = pipeline("image-classification", model="model")
from pathlib import Path
rows = [classify(str(p))[0]["label"] for p in Path("photos").iterdir()]
""",
    ),
}
COMMANDS = {
    "jft": "jft finetune --data bees/ --model resnet18 --plan lp-ft\n"
    "jft predict runs/bees-resnet18-lp-ft photos/ --out preds.csv",
    "Ultralytics": "yolo classify train data=bees model=yolo11n-cls.pt epochs=10\n"
    "yolo classify predict model=runs/classify/train/weights/best.pt source=photos save_txt",
    "timm": "git clone https://github.com/huggingface/pytorch-image-models\n"
    "python train.py bees --model resnet18 --pretrained --num-classes 2\n"
    "python inference.py photos --model resnet18 --num-classes 2 --checkpoint output/train/…/model_best.pth.tar",
    "Transformers Trainer": "git clone https://github.com/huggingface/transformers\n"
    "python run_image_classification.py --train_dir bees --output_dir run --do_train --do_eval …",
}
LACKS = {"Transformers Trainer": " and a program to predict"}


def count(program: str) -> tuple[int, int]:
    """Statements, and those of them that import nothing."""
    found = [node for node in ast.walk(ast.parse(program)) if isinstance(node, ast.stmt)]
    return len(found), sum(not isinstance(node, ast.Import | ast.ImportFrom) for node in found)


if __name__ == "__main__":
    print("| tool | commands | Python statements (without imports) | after |\n|---|---:|---:|---|")
    for tool in dict.fromkeys([*PYTHON, *COMMANDS]):
        lines = str(len(COMMANDS[tool].splitlines())) + LACKS.get(tool, "") if tool in COMMANDS else "none"
        told = "{} ({})".format(*count(PYTHON[tool][1])) if tool in PYTHON else "its scripts are the way"
        print(f"| {tool} | {lines} | {told} | {PYTHON[tool][0] if tool in PYTHON else 'its documentation'} |")
