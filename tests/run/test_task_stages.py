"""TaskEvaluation fills the columns of a fit's own report."""

import pytest
from runs import make_data, make_module, make_trainer, write_model
from task_files import write_tasks

from prunelight.callbacks import ShortGPT, TaskEvaluation
from prunelight.evaluation.examiners import Examiner
from prunelight.evaluation.tasks.flips import count_flips
from prunelight.evaluation.tasks.saving import task_result

pytest.importorskip("lm_eval")


def test_a_fit_asks_the_questions_of_each_stage_and_counts_flips(tmp_path):
    name = write_model(tmp_path / "model")
    data = write_tasks(tmp_path / "tasks")
    tasks = TaskEvaluation(["arc_easy", "piqa"], limit=6, tasks_dir=str(data), batch_size=4)
    module = make_module(name)
    trainer = make_trainer(tmp_path, ShortGPT(num_layers=2), tasks)
    trainer.fit(module, make_data(name, tmp_path))
    stages = {stage.name: stage.examined["tasks"] for stage in module.record.stages}
    assert [*stages] == ["dense", "pruned", "recovered"]
    results = {
        stage: {task: task_result(values) for task, values in answer["tasks"].items()}
        for stage, answer in stages.items()
    }
    assert "flips" not in stages["dense"]
    for stage in ("pruned", "recovered"):
        assert [*results[stage]] == ["arc_easy", "piqa"]
        for task, counted in stages[stage]["flips"].items():
            assert vars(count_flips(results["dense"][task], results[stage][task])) == counted
            assert counted["num_questions"] == 6


def test_an_unknown_task_stops_a_fit_before_anything_is_computed(tmp_path):
    name = write_model(tmp_path / "model")
    data = write_tasks(tmp_path / "tasks")
    trainer = make_trainer(
        tmp_path, ShortGPT(num_layers=2), TaskEvaluation(["piqa"], tasks_dir=str(tmp_path))
    )
    with pytest.raises(OSError, match=r"put piqa/validation.jsonl under"):
        trainer.fit(make_module(name), make_data(name, data))


def test_the_settings_are_checked_and_described(tmp_path):
    data = write_tasks(tmp_path)
    tasks = TaskEvaluation(["piqa"], limit=2, tasks_dir=str(data))
    assert isinstance(tasks, Examiner)
    before = tasks.describe_examination()
    rows = (data / "piqa/validation.jsonl").read_text()
    (data / "piqa/validation.jsonl").write_text(rows.replace("w5", "w6"))
    after = TaskEvaluation(["piqa"], limit=2, tasks_dir=str(data)).describe_examination()
    assert before["limit"] == 2
    assert before["files"] != after["files"]
    with pytest.raises(ValueError, match="limit=0 must be at least 1"):
        TaskEvaluation(["piqa"], limit=0)
    with pytest.raises(ValueError, match="tasks=\\[\\] must not be empty"):
        TaskEvaluation([])
    with pytest.raises(ValueError, match="batch_size=0 must be at least 1"):
        TaskEvaluation(["piqa"], batch_size=0)
