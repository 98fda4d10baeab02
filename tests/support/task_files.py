"""Tiny tasks for tests: rows in tasks_dir's layout, of words that the tiny tokenizer knows."""

from __future__ import annotations

import json
import random
from pathlib import Path

GENERATION = """\
task: copy_word
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["</s>"], max_gen_toks: 3, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""


def words(rng, count):
    return " ".join(f"w{rng.randint(4, 127)}" for _ in range(count))


def write_rows(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_tasks(root: Path, num_rows: int = 12) -> Path:
    """Write piqa, arc_easy, cmmlu (all subjects that are asked for) and a task of generation."""
    rng = random.Random(0)
    piqa = [
        {
            "goal": words(rng, rng.randint(2, 9)),
            "sol1": words(rng, 3),
            "sol2": words(rng, rng.randint(1, 4)),
            "label": rng.randint(0, 1),
        }
        for _ in range(num_rows)
    ]
    write_rows(root / "piqa" / "validation.jsonl", piqa)
    arc = [
        {
            "id": str(index),
            "question": words(rng, 5),
            "choices": {"text": [words(rng, 2) for _ in "ABCD"], "label": [*"ABCD"]},
            "answerKey": rng.choice("ABCD"),
        }
        for index in range(num_rows)
    ]
    write_rows(root / "arc_easy" / "test.jsonl", arc)
    subjects = [
        {
            "subject": subject,
            "Question": words(rng, 6),
            **{letter: words(rng, 1) for letter in "ABCD"},
            "Answer": rng.choice("ABCD"),
        }
        for index in range(num_rows)
        for subject in ("anatomy", "arts")
    ]
    write_rows(root / "cmmlu" / "test.jsonl", subjects)
    write_rows(root / "cmmlu" / "dev.jsonl", subjects[:4])
    copies = [{"question": words(rng, 4), "answer": words(rng, 1)} for _ in range(5)]
    write_rows(root / "copies.jsonl", copies)
    (root / "copy_word.yaml").write_text(GENERATION.format(file=root / "copies.jsonl"))
    return root
