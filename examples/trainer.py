"""Classify texts with transformers' Trainer: python examples/trainer.py [MODEL] [OUTPUT]"""

import sys

from datasets import Dataset
from peft import AutoPeftModelForSequenceClassification, get_peft_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import pica

TEXTS = ["a lovely film", "a great story", "its end was warm", "a dull film", "an awful story", "its end was weak"]
LABELS = [1, 1, 1, 0, 0, 0]


def main(name: str = "sentence-transformers/all-MiniLM-L6-v2", output: str = "film-adapter") -> list[float]:
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForSequenceClassification.from_pretrained(name, num_labels=2)
    # The head is new: with this task type PEFT trains it in full and stores it with the adapter. The pooler may be new too.
    model = get_peft_model(model, pica.PicaConfig(r=16, task_type="SEQ_CLS", modules_to_save=["pooler"]))
    print(pica.coverage(model))

    rows = Dataset.from_dict(dict(tokenizer(TEXTS)) | {"labels": LABELS})
    arguments = TrainingArguments(
        output, learning_rate=1e-2, num_train_epochs=30, logging_steps=1, report_to="none", save_strategy="no"
    )
    trainer = Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()

    again = AutoPeftModelForSequenceClassification.from_pretrained(output, num_labels=2)
    found = again(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits.argmax(dim=1)
    print("right:", sum(found.tolist()[i] == LABELS[i] for i in range(len(LABELS))), "of", len(LABELS))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main(*sys.argv[1:])
