"""Read saved models with another program: log-probabilities of every token at every position.

    PYTHON tests/engines/readers.py ENGINE JOBS.json

PYTHON is that of the engine's own environment (`.ci/engines` makes it); nothing of prunelight is
imported. JOBS.json is a list of {"directory", "ids", "vocabulary", "output", "options"}. Each job
writes OUTPUT.npy, (tokens, vocabulary) in float32, or OUTPUT.txt with the engine's refusal.
Everything runs on the CPU in float32.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Job = dict[str, Any]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log-probabilities of logits, (tokens, vocabulary)."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return (shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))).astype(np.float32)


def read_transformers(job: Job) -> np.ndarray:
    """Read with plain `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trust = job["options"].get("trust_remote_code", False)
    AutoTokenizer.from_pretrained(job["directory"], trust_remote_code=trust)
    model = AutoModelForCausalLM.from_pretrained(job["directory"], trust_remote_code=trust)
    with torch.no_grad():
        logits = model.float().eval()(torch.tensor([job["ids"]])).logits[0]
    return log_softmax(logits.numpy())


def read_vllm(job: Job) -> np.ndarray:
    """Read with `vllm.LLM`; vLLM tells the probabilities of tokens from the second one on."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    ids, size = job["ids"], job["vocabulary"]
    engine = LLM(
        model=job["directory"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=len(ids) + 8,
        max_logprobs=-1,
        skip_tokenizer_init=True,
        trust_remote_code=job["options"].get("trust_remote_code", False),
    )
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=-1, detokenize=False)
    # One token more, so that the last position of the text has its probabilities too.
    prompt = {"prompt_token_ids": [*ids, ids[0]]}
    (answer,) = engine.generate(prompt, sampling, use_tqdm=False)
    table = [
        [place[token].logprob for token in range(size)] for place in answer.prompt_logprobs[1:]
    ]
    del engine
    cleanup_dist_env_and_memory()
    return np.array(table, dtype=np.float32)


def read_llamacpp(job: Job) -> np.ndarray:
    """Convert with llama.cpp's own script to a GGUF in float32, then read that.

    The environment variable LLAMA_CPP is the directory of llama.cpp's source.
    """
    import llama_cpp

    complaints: list[str] = []

    @llama_cpp.llama_log_callback
    def listen(level: int, text: bytes, _: Any) -> None:
        if level == 4:  # an error
            complaints.append(text.decode(errors="replace").strip())

    llama_cpp.llama_log_set(listen, None)
    with tempfile.TemporaryDirectory() as directory:
        file = str(Path(directory) / "model.gguf")
        command = [sys.executable, __file__, "convert", job["directory"], file]
        run = subprocess.run(
            [*command, json.dumps(job["options"])], capture_output=True, text=True, check=False
        )
        if run.returncode:
            raise RuntimeError(f"the converter: {run.stderr.strip().splitlines()[-1]}")
        try:
            engine = llama_cpp.Llama(
                file,
                n_ctx=max(256, len(job["ids"])),
                n_threads=1,
                logits_all=True,
                type_k=llama_cpp.GGML_TYPE_F32,  # the cache is float16 otherwise
                type_v=llama_cpp.GGML_TYPE_F32,
                flash_attn=False,
                verbose=False,
            )
        except ValueError as error:
            raise ValueError(complaints[0] if complaints else error) from error
        engine.eval(job["ids"])
        logits = np.array(engine.scores[: len(job["ids"])])
        engine.close()
    return log_softmax(logits)


def convert_for_llamacpp(directory: str, file: str, options: str) -> None:
    """Run llama.cpp's converter without a vocabulary: token ids are fed.

    The converter knows tokenizers by a checksum, and refuses that of a tiny test tokenizer.
    """
    source = Path(os.environ["LLAMA_CPP"])
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    import convert_hf_to_gguf
    from conversion import get_model_class

    settings = json.loads(options)
    config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    model = get_model_class(config["architectures"][0])

    def no_vocabulary(self: Any) -> None:
        self.gguf_writer.add_tokenizer_model("none")
        self.gguf_writer.add_vocab_size(config["vocab_size"])

    for kind in model.__mro__:
        if "set_vocab" in vars(kind):
            kind.set_vocab = no_vocabulary
    if settings.get("window_pattern"):
        write = model.set_gguf_parameters

        def write_with_pattern(self: Any) -> None:
            write(self)
            kinds = self.hparams["layer_types"]
            self.gguf_writer.add_sliding_window_pattern([x == "sliding_attention" for x in kinds])

        model.set_gguf_parameters = write_with_pattern
    sys.argv = ["convert", directory, "--outfile", file, "--outtype", "f32"]
    convert_hf_to_gguf.main()


def read_ctranslate2(job: Job) -> np.ndarray:
    """Convert with CTranslate2's own converter, then read that."""
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    with tempfile.TemporaryDirectory() as directory:
        trust = job["options"].get("trust_remote_code", False)
        converter = TransformersConverter(job["directory"], trust_remote_code=trust)
        converter.convert(directory, force=True)
        engine = ctranslate2.Generator(directory, device="cpu", compute_type="float32")
        logits = np.array(engine.forward_batch([job["ids"]]))[0]
    return log_softmax(logits)


def read_peft(job: Job) -> np.ndarray:
    """Put peft's LoRA on the model, with peft's own choice of modules; it changes nothing yet."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    trust = job["options"].get("trust_remote_code", False)
    model = AutoModelForCausalLM.from_pretrained(job["directory"], trust_remote_code=trust)
    model = get_peft_model(model.float(), LoraConfig(task_type="CAUSAL_LM")).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([job["ids"]])).logits[0]
    return log_softmax(logits.numpy())


def read_lm_eval(job: Job) -> np.ndarray:
    """Read with lm-eval's `HFLM`, as `lm_eval --model hf` does."""
    import torch
    from lm_eval.models.huggingface import HFLM

    trust = job["options"].get("trust_remote_code", False)
    reader = HFLM(job["directory"], dtype="float32", device="cpu", trust_remote_code=trust)
    with torch.no_grad():
        logits = reader.model(torch.tensor([job["ids"]])).logits[0]
    return log_softmax(logits.numpy())


READERS: dict[str, Callable[[Job], np.ndarray]] = {
    "transformers 4.57": read_transformers,
    "vLLM": read_vllm,
    "llama.cpp": read_llamacpp,
    "CTranslate2": read_ctranslate2,
    "peft": read_peft,
    "lm-eval": read_lm_eval,
}


def main(engine: str, jobs: str) -> None:
    """Carry out all jobs with one engine."""
    for job in json.loads(Path(jobs).read_text(encoding="utf-8")):
        output = Path(job["output"])
        try:
            np.save(output.with_suffix(".npy"), READERS[engine](job))
        except BaseException as error:  # an engine refuses in many ways, SystemExit is one
            traceback.print_exc()
            words = " ".join(str(error).split())[:300]
            output.with_suffix(".txt").write_text(f"{type(error).__name__}: {words}")


if __name__ == "__main__":
    if sys.argv[1] == "convert":
        convert_for_llamacpp(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
