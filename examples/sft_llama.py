"""TRL's SFTTrainer, which puts PEFT's LoRA into the model, accelerated; --nf4: on 4 bits. Needs trl, bitsandbytes."""

import sys
import tempfile

from datasets import Dataset
from peft import LoraConfig
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from trl import SFTConfig, SFTTrainer

import lorakernels as lk
from lorakernels.integrations.peft import AccelerationReport


def character_tokenizer() -> PreTrainedTokenizerFast:
    """A token a character, so that nothing has to be downloaded or trained."""
    vocabulary = {token: number for number, token in enumerate(["<pad>", "</s>", *"0123456789 +="])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def main(folder: str, steps: int = 60, nf4: bool = False) -> tuple[AccelerationReport, list[float]]:
    """Trains on sums, saves the adapter in `folder`, and gives the report and the logged losses."""
    set_seed(0)
    tokenizer = character_tokenizer()
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, initializer_range=0.1))
    if nf4:
        model.save_pretrained(f"{folder}/base")
        packed = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        model = LlamaForCausalLM.from_pretrained(f"{folder}/base", quantization_config=packed)
    sums = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(20) for b in range(20)]
    arguments = SFTConfig(
        output_dir=f"{folder}/checkpoints",
        max_steps=steps,
        per_device_train_batch_size=16,
        learning_rate=2e-2,
        logging_steps=max(steps // 6, 1),
        bf16=False,
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(sums),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    )
    report = lk.accelerate(trainer.model)  # after the trainer has made the PeftModel
    print(report)
    trainer.train()
    trainer.model.save_pretrained(folder)
    return report, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    main(tempfile.mkdtemp(), nf4="--nf4" in sys.argv)
