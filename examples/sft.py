"""Teach a chat model a way of speaking with TRL's SFTTrainer: python examples/sft.py [MODEL] [OUTPUT] [STEPS]"""

import sys
from pathlib import Path

from datasets import load_dataset
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

import pica

CONVERSATIONS = Path(__file__).with_name("lighthouse.jsonl")


def main(name: str = "HuggingFaceTB/SmolLM2-135M-Instruct", output: str = "maren-adapter", steps: str = "72"):
    trainer = SFTTrainer(
        model=name,
        args=SFTConfig(
            output_dir=output,
            learning_rate=5e-3,
            max_steps=int(steps),
            per_device_train_batch_size=4,
            assistant_only_loss=False,
            bf16=False,  # leave it out on a GPU that has bfloat16
            logging_steps=1,
            report_to="none",
            save_strategy="no",
        ),
        train_dataset=load_dataset("json", data_files=str(CONVERSATIONS), split="train"),
        peft_config=pica.PicaConfig(r=32, task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model()

    tokenizer = AutoTokenizer.from_pretrained(output)
    model = AutoPeftModelForCausalLM.from_pretrained(output)
    asked = [{"role": "user", "content": "Is it going to rain tomorrow?"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=40, do_sample=False)
    print(tokenizer.decode(answer[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main(*sys.argv[1:])
