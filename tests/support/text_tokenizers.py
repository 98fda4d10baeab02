"""A small real tokenizer, trained on the bundled sample, and examples of instructions."""

from functools import cache
from importlib.resources import files

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.</s>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ALPACA = {"instruction": "Add the numbers.", "input": "1 and 2", "output": "The sum is 3."}
PAIR = {"prompt": "The capital of France is", "response": " Paris."}
CHAT = {
    "messages": [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Good day."},
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "A parrot."},
    ]
}


def sample(name):
    return files("prunelight.data").joinpath("sample", f"{name}.txt").read_text(encoding="utf-8")


@cache
def trained_bpe():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>", "<pad>", "<bos>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([sample("calibration")[:40_000]], trainer)
    return tokenizer.to_str()


def make_tokenizer(bos_token=None, eos_token="</s>", pad_token=None, chat_template=None):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(trained_bpe()),
        bos_token=bos_token,
        eos_token=eos_token,
        pad_token=pad_token,
    )
    tokenizer.chat_template = chat_template
    return tokenizer
