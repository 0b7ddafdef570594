"""transformers' Trainer on a small Llama with PEFT's LoRA, accelerated. Needs transformers, peft and accelerate."""

import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import lorakernels as lk
from lorakernels.integrations.peft import AccelerationReport

VOCABULARY, LENGTH = 64, 16


def counting(examples: int) -> list[dict[str, torch.Tensor]]:
    """Sequences that count on in steps of 1, 2 or 3."""
    starts, strides = torch.randint(VOCABULARY, (examples, 1)), torch.randint(1, 4, (examples, 1))
    tokens = (starts + strides * torch.arange(LENGTH)) % VOCABULARY
    return [{"input_ids": row, "labels": row} for row in tokens]


def main(folder: str, steps: int = 60) -> tuple[AccelerationReport, list[float]]:
    """Trains, saves the adapter in `folder`, and gives the report and the logged losses."""
    set_seed(0)
    llama = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(llama), lora)
    report = lk.accelerate(model)  # the only line that is not the usual recipe
    print(report)

    arguments = TrainingArguments(
        output_dir=f"{folder}/checkpoints",
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=2e-2,
        logging_steps=max(steps // 6, 1),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=counting(512))
    trainer.train()
    model.save_pretrained(folder)  # PEFT's own files
    return report, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main(tempfile.mkdtemp())
