"""Answer one batch with several adapters: python examples/several_adapters.py MODEL ADAPTER ADAPTER ...

The adapters share the model and its bases, so each costs no more than its own matrices.
"""

import sys

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import pica


def main(name: str, first: str, *others: str) -> dict[str, str]:
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(name), first, adapter_name=first)
    for folder in others:
        model.load_adapter(folder, adapter_name=folder)
    print(pica.coverage(model, first))

    names = [first, *others, "__base__"]  # who answers which row; PEFT's word for the model alone
    batch = tokenizer(["The fog horn"] * len(names), padding=True, return_tensors="pt")
    answers = model.generate(**batch, adapter_names=names, max_new_tokens=12, do_sample=False)
    said = dict(zip(names, tokenizer.batch_decode(answers, skip_special_tokens=True)))
    for who, text in said.items():
        print(f"{who}: {text!r}")
    return said


if __name__ == "__main__":
    main(*sys.argv[1:])
