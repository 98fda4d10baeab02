"""Two processes that share the prompts of tasks get exactly what one gets; groups of tasks."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import task_ranks
from task_files import write_rows, write_tasks
from tiny import tiny_model

from prunelight.evaluation.tasks.flips import count_flips
from prunelight.evaluation.tasks.running import run_tasks
from prunelight.evaluation.tasks.task_set import check_tasks

pytest.importorskip("lm_eval")
TASKS = "piqa cmmlu_arts copy_word"
LAUNCH = """
import sys, torch.multiprocessing
sys.path.insert(0, sys.argv[1])
from task_ranks import work
torch.multiprocessing.start_processes(work, sys.argv[2:], nprocs=2, start_method="fork")
"""


def test_two_processes_get_exactly_what_one_gets_and_fail_together(tmp_path, tiny_tokenizer):
    data = write_tasks(tmp_path / "tasks")
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    support = str(Path(task_ranks.__file__).parent)
    subprocess.run(
        [sys.executable, "-c", LAUNCH, support, str(tmp_path), TASKS], check=True, timeout=300
    )
    alone = run_tasks(
        tiny_model(), tiny_tokenizer, check_tasks(TASKS.split(), tasks_dir=data), batch_size=4
    )
    ranks = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    for rank in ranks:
        assert rank["results"] == {name: asdict(result) for name, result in alone.items()}
        assert rank["forwards"] > 0
    assert ranks[0]["error"] == "rank 1 failed: the memory of this rank is gone"
    assert ranks[1]["error"] == "the memory of this rank is gone"


GROUP = """\
group: two_subjects
task: [cmmlu_anatomy, cmmlu_arts]
aggregate_metric_list:
  - {metric: acc, aggregation: mean, weight_by_size: true}
metadata: {version: 1.0}
"""


@pytest.fixture
def grouped(tmp_path):
    data = write_tasks(tmp_path / "tasks")
    rows = [json.loads(line) for line in (data / "cmmlu/test.jsonl").read_text().splitlines()]
    write_rows(data / "cmmlu/test.jsonl", rows[:-4:])
    (data / "two_subjects.yaml").write_text(GROUP)
    return data


def test_a_group_has_the_outcomes_of_its_parts_and_the_aggregation_of_lm_eval(
    grouped, tiny_tokenizer
):
    task_set = check_tasks(["two_subjects"], tasks_dir=grouped)
    results = run_tasks(tiny_model(), tiny_tokenizer, task_set, batch_size=4)
    group = results["two_subjects"]
    assert [part.task for part in group.parts] == ["cmmlu_anatomy", "cmmlu_arts"]
    assert group.metric == "acc"
    assert group.outcomes == "".join(part.outcomes for part in group.parts)
    assert group.num_questions == 20
    assert group.value == pytest.approx(group.outcomes.count("1") / 20)
    assert group.stderr is not None
    assert group.data == "cmmlu/test.jsonl"
    assert count_flips(group, group).num_questions == 20


def test_a_task_is_asked_for_once(grouped):
    with pytest.raises(ValueError, match="ask for cmmlu_arts twice, by two_subjects and by"):
        check_tasks(["two_subjects", "cmmlu_arts"], tasks_dir=grouped)
