"""Slicing on SmolLM2-135M: perplexity and true parameters, before and after LoRA, and the cost.

    python tests/benchmarks/slicing.py quality --calibration c4.jsonl --evaluation wiki.test.txt
    python tests/benchmarks/slicing.py recover --calibration c4.jsonl --evaluation wiki.test.txt
    python tests/benchmarks/slicing.py cost
    python tests/benchmarks/slicing.py reload --directory runs/dynamic_slicing_30_lora/final

Methods are calibrated on the first half of the documents of `--calibration` and evaluated on
`--evaluation` and on the second half. Without files, both texts are those that come with
prunelight.
"""

import copy
import re
import time

import torch
from common import data_of, lora, measuring, parser, perplexities, size
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import prunelight
from prunelight.calibration.windows import micro_batches
from prunelight.callbacks import DynamicSlicing, ShortGPT, SliceGPT
from prunelight.models.forward import evaluating
from prunelight.models.sizes import parameter_bytes, parameter_count
from prunelight.pruning.slicing.basis import principal_components
from prunelight.training.text_datamodule import TextDataModule

CPU = torch.device("cpu")


def methods():
    """Name -> what makes a callback from a slice ratio."""
    found = {
        "SliceGPT": lambda r: SliceGPT(r),
        "SliceGPT, normalized": lambda r: SliceGPT(r, signal="normalized"),
        "SliceGPT, sliced embeddings": lambda r: SliceGPT(r, embedding="sliced"),
        "SliceGPT, random": lambda r: SliceGPT(r, orientation="random"),
        "SliceGPT, shared": lambda r: SliceGPT(r, rotation="shared"),
        "SliceGPT, shared, normalized": lambda r: SliceGPT(
            r, rotation="shared", signal="normalized"
        ),
        "DynamicSlicing": lambda r: DynamicSlicing(r),
        "DynamicSlicing, normalized": lambda r: DynamicSlicing(r, signal="normalized"),
    }
    for share in (75, 50, 25, 0):
        found[f"base {share} %"] = lambda r, s=share: DynamicSlicing(r, r * s / 100)
    return found


def chosen(pattern):
    return {name: make for name, make in methods().items() if re.fullmatch(pattern, name)}


def apply(model, windows, method):
    pruned = copy.deepcopy(model)
    plan = method.plan(pruned, windows)
    return prunelight.apply(pruned, plan, windows), plan


def quality(model, data, ratios, pattern):
    dense = parameter_count(model)
    print("dense", perplexities(model, data), flush=True)
    for name, make in chosen(pattern).items():
        for ratio in ratios:
            sliced, plan = apply(model, data[0], make(ratio))
            found = perplexities(sliced, data)
            print(f"{name} | {ratio} | {size(sliced, dense)} | {found} | {plan.found}", flush=True)


def recover(model, tokenizer, data, ratios, pattern, steps):
    """Perplexity before and after LoRA on the bundled text, the same for each method."""
    dense = parameter_count(model)
    for name, make in chosen(pattern).items():
        for ratio in ratios:
            sliced, plan = apply(model, data[0], make(ratio))
            shown = f"{name} (base {plan.found.get('base_ratio', ratio)}) | {ratio}"
            shown += f" | {size(sliced, dense)}"
            found = lora(lambda it=sliced: it, tokenizer, data, steps, f"{ratio}-{hash(name)}")
            print(f"{shown} | {found}", flush=True)


def cost(model, windows, ratio):
    with evaluating(model):
        start = time.perf_counter()
        for batch in micro_batches(model, windows):
            model(**batch)
        unit = time.perf_counter() - start
    hidden = model.config.hidden_size
    gram = torch.randn(hidden, hidden, dtype=torch.float64)
    gram = gram @ gram.T
    start = time.perf_counter()
    principal_components(gram, hidden)
    decompositions = (2 * model.config.num_hidden_layers - 1) * (time.perf_counter() - start)
    method = SliceGPT(ratio)
    plan = method.plan(model, windows)
    with measuring(CPU) as idle:
        pass
    with measuring(CPU) as phase:
        sliced = prunelight.apply(copy.deepcopy(model), plan, windows)
    buffer = windows.numel() * hidden * model.dtype.itemsize
    above = phase.peak_bytes - idle.peak_bytes - parameter_bytes(model)
    with evaluating(sliced):
        start = time.perf_counter()
        for batch in micro_batches(sliced, windows):
            sliced(**batch)
        fast = time.perf_counter() - start
    print(
        f"{windows.numel()} tokens: slicing {phase.seconds / unit:.2f} F, of which about "
        f"{decompositions / unit:.2f} F eigendecompositions; memory above the two models "
        f"{above / buffer:.2f} activation buffers ({above / parameter_bytes(model):.2f} "
        f"checkpoints); a forward of the sliced model {fast / unit:.2f} F",
        flush=True,
    )


def speed(model, ratio):
    """Forward time of a sliced model and of one with a fifth of its layers removed."""
    windows = torch.randint(1000, (8, 256))
    short = ShortGPT(num_layers=6)
    models = {"dense": model, "24 layers": apply(model, windows, short)[0]}
    models["sliced"] = apply(model, windows, SliceGPT(ratio))[0]
    for _ in range(3):
        for name, one in models.items():
            with evaluating(one):
                start = time.perf_counter()
                for batch in micro_batches(one, windows):
                    one(**batch)
                print(name, f"{time.perf_counter() - start:.2f} s", flush=True)


def reload(directory, tokenizer):
    """What a directory gives in full precision and in NF4, on four windows of the bundled text."""
    windows = TextDataModule(tokenizer, seq_len=512, num_validation=4).validation_windows()
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    for name, settings in (("as saved", {}), ("NF4", {"quantization_config": nf4})):
        model = AutoModelForCausalLM.from_pretrained(directory, **settings)
        print(
            name, type(model).__name__, f"{prunelight.perplexity(model, windows):.2f}", flush=True
        )


def main():
    what = ("quality", "recover", "cost", "speed", "reload")
    asked = parser(__doc__, what, samples=32, seq_len=512)
    asked.add_argument("--ratios", type=float, nargs="*", default=[0.1, 0.2, 0.25, 0.3])
    asked.add_argument("--methods", default=".*", help="a regular expression of whole names")
    asked.add_argument("--directory", help="of a sliced model, to reload")
    options = asked.parse_args()
    if options.what == "reload":
        return reload(options.directory, AutoTokenizer.from_pretrained(options.directory))
    model, tokenizer = prunelight.load(options.model, dtype=options.dtype)
    data = data_of(tokenizer, options)
    if options.what == "quality":
        quality(model, data, options.ratios, options.methods)
    elif options.what == "recover":
        recover(model, tokenizer, data, options.ratios, options.methods, options.steps)
    elif options.what == "cost":
        cost(model, data[0], options.ratios[-1])
    else:
        speed(model, options.ratios[-1])


if __name__ == "__main__":
    main()
