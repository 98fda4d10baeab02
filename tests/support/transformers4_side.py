"""What runs in the environment of transformers 4, as a program: it prints JSON.

`families` prints, for each causal language model, the arguments of its config with their defaults.
`logits DIRECTORY` loads each model below DIRECTORY, and prints what it computes from `ids.json`.
"""

import inspect
import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def families():
    return {kind: describe(CONFIG_MAPPING[kind]) for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}


def describe(config):
    arguments = inspect.signature(config.__init__).parameters
    return {
        "arguments": {
            name: repr(argument.default)
            for name, argument in arguments.items()
            if name not in ("self", "kwargs")
        },
        "aliases": dict(config.attribute_map),
    }


def logits(root):
    ids = torch.tensor(json.loads((root / "ids.json").read_text()))
    return {file.parent.name: computed(file.parent, ids) for file in root.glob("*/config.json")}


@torch.no_grad()
def computed(directory, ids):
    try:
        settings = {"attn_implementation": "eager"} if (directory / "eager").exists() else {}
        own = any(directory.glob("*.py"))  # the code of a class of ours
        model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=own, **settings)
        words = None
        if (directory / "tokenizer.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(directory)
            words = tokenizer("w7 <extra> w9", add_special_tokens=False)["input_ids"]
        return {
            "logits": model.eval()(input_ids=ids, use_cache=False).logits.tolist(),
            "words": words,
        }
    except Exception as error:
        return f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    assert transformers.__version__.startswith("4."), transformers.__version__
    transformers.logging.set_verbosity_error()
    command, *arguments = sys.argv[1:]
    result = families() if command == "families" else logits(Path(*arguments))
    print(json.dumps(result))
