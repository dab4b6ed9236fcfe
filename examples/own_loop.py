"""Train in a loop of your own: python examples/own_loop.py [MODEL] [OUTPUT]"""

import sys

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import pica

TEXTS = ["The light turns once in ten seconds.", "The fog horn sounds twice a minute."]


def main(name: str = "HuggingFaceTB/SmolLM2-135M", output: str = "light-adapter") -> list[float]:
    tokenizer = AutoTokenizer.from_pretrained(name)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(name), pica.PicaConfig(r=32))
    model.print_trainable_parameters()
    # Only the shared matrices ask for a gradient; the frozen directions are buffers, which no optimizer sees.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    losses = []
    for _ in range(10):
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")

    # As PEFT's save_pretrained, but whole or not at all: a full disk leaves the adapter that was there.
    pica.save_adapter(model, output)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(name), output)
    with torch.no_grad():
        difference = again(**batch).logits - model.eval()(**batch).logits
    print(f"largest difference after loading: {difference.abs().max():.1e}")
    return losses


if __name__ == "__main__":
    main(*sys.argv[1:])
