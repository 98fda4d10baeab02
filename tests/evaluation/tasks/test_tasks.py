"""Tasks of lm-eval on a model in memory, from local rows."""

import copy
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from task_files import write_rows, write_tasks
from tiny import tiny_model

from prunelight.evaluation.tasks.catalog import PAPER_TASKS, check_lm_eval_installed, spelled_out
from prunelight.evaluation.tasks.flips import count_flips
from prunelight.evaluation.tasks.running import run_tasks
from prunelight.evaluation.tasks.saving import task_result, tasks_answer
from prunelight.evaluation.tasks.task_set import check_tasks

pytest.importorskip("lm_eval")
TASKS = ["piqa", "arc_easy", "cmmlu_anatomy", "copy_word"]


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def task_set(tasks_dir):
    return check_tasks(TASKS, tasks_dir=tasks_dir)


@pytest.fixture
def results(task_set, tiny_tokenizer):
    return run_tasks(tiny_model(), tiny_tokenizer, task_set, batch_size=4)


# --- lm-eval's command line on the same directory and rows

STOCK = """\
include: {stock}
task: {task}
dataset_path: json
dataset_name: null
dataset_kwargs: {{data_files: {{{split}: {file}}}}}
training_split: null
fewshot_split: null
{others}
"""


def command_line(directory, tasks, yamls, out, *options):
    """Return what `lm_eval` itself says of a saved model."""
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={directory}", "--include_path", str(yamls)]
    command += ["--tasks", *tasks, "--output_path", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = out.rglob("results_*.json")
    return json.loads(file.read_text())["results"]


def stock_file(task):
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    places = {"piqa": "piqa/piqa.yaml", "arc_easy": "arc/arc_easy.yaml"}
    return root / places.get(task, f"cmmlu/{task}.yaml")


def write_yamls(folder, tasks_dir):
    """Write the stock settings with only the data swapped, as a user of lm-eval would."""
    folder.mkdir()
    rows = [json.loads(line) for line in (tasks_dir / "cmmlu/test.jsonl").read_text().splitlines()]
    anatomy = folder / "anatomy.jsonl"
    write_rows(anatomy, [row for row in rows if row["subject"] == "anatomy"])
    files = {
        "piqa": ("validation", tasks_dir / "piqa/validation.jsonl", ""),
        "arc_easy": ("test", tasks_dir / "arc_easy/test.jsonl", "validation_split: null"),
        "cmmlu_anatomy": ("test", anatomy, ""),
    }
    for task, (split, file, others) in files.items():
        text = STOCK.format(
            stock=stock_file(task), task=task, split=split, file=file, others=others
        )
        (folder / f"{task}.yaml").write_text(text)
    (folder / "copy_word.yaml").write_text((tasks_dir / "copy_word.yaml").read_text())
    return folder


def without_filter(values):
    return {
        key.removesuffix(",none"): value
        for key, value in values.items()
        if isinstance(value, float) and "," in key
    }


@pytest.mark.slow
def test_metrics_are_exactly_those_of_the_command_line_of_lm_eval(
    tasks_dir, tiny_tokenizer, results, tmp_path
):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    yamls = write_yamls(tmp_path / "yamls", tasks_dir)
    theirs = command_line(tmp_path / "model", TASKS, yamls, tmp_path / "out", "--batch_size", "4")
    assert {name: result.metrics for name, result in results.items()} == {
        name: without_filter(theirs[name]) for name in TASKS
    }


REAL_ROWS = [
    ("To keep bread fresh,", "put it into a closed box.", "put it into a bucket of water.", 0),
    ("How do you open a jar?", "Hit the lid until it melts.", "Turn the lid to the left.", 1),
    ("To boil an egg,", "heat water and put the egg in.", "heat sand and put the egg on it.", 0),
    ("To dry wet shoes,", "freeze them over night.", "stuff them with paper.", 1),
    ("How do you sharpen a pencil?", "Use a pencil sharpener.", "Use a rubber.", 0),
]


@pytest.mark.sweep
@pytest.mark.real
@pytest.mark.slow
def test_the_real_model_has_exactly_the_metrics_of_the_command_line(smollm2, tmp_path):
    model, tokenizer = smollm2
    names = ("goal", "sol1", "sol2", "label")
    rows = [dict(zip(names, values, strict=True)) for values in REAL_ROWS]
    write_rows(tmp_path / "piqa/validation.jsonl", rows)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "yamls").mkdir()
    file, stock = tmp_path / "piqa/validation.jsonl", stock_file("piqa")
    text = STOCK.format(stock=stock, task="piqa", split="validation", file=file, others="")
    (tmp_path / "yamls/piqa.yaml").write_text(text)
    theirs = command_line(
        tmp_path / "model", ["piqa"], tmp_path / "yamls", tmp_path / "out", "--batch_size", "2"
    )
    task_set = check_tasks(["piqa"], tasks_dir=tmp_path)
    ours = run_tasks(model, tokenizer, task_set, batch_size=2)["piqa"]
    assert ours.metrics == without_filter(theirs["piqa"])


# --- laws


def test_outcomes_average_to_the_value(results):
    for result in results.values():
        assert len(result.outcomes) == result.num_questions
        assert result.outcomes.count("1") / result.num_questions == pytest.approx(result.value)


def test_a_limit_asks_the_first_questions(results, tasks_dir, tiny_tokenizer):
    few = check_tasks(["piqa"], tasks_dir=tasks_dir, limit=3)
    first = run_tasks(tiny_model(), tiny_tokenizer, few, batch_size=4)["piqa"]
    assert first.num_questions == 3
    assert results["piqa"].outcomes.startswith(first.outcomes)
    with pytest.raises(ValueError, match="flips need the same questions: piqa with 12 questions"):
        count_flips(results["piqa"], first)


def test_the_model_the_tokenizer_and_random_numbers_stay_as_they_were(task_set, tiny_tokenizer):
    model = tiny_model(tie_word_embeddings=True, dtype=torch.bfloat16).train()
    model.model.layers[0].eval()
    tiny_tokenizer.pad_token = None
    before = copy.deepcopy(model.state_dict())
    parameters = {name: id(value) for name, value in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    config, generation = model.config.to_dict(), model.generation_config.to_dict()
    state = torch.get_rng_state()
    run_tasks(model, tiny_tokenizer, task_set, batch_size=4)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert {name: id(value) for name, value in model.named_parameters()} == parameters
    assert [module.training for module in model.modules()] == modes
    assert (model.config.to_dict(), model.generation_config.to_dict()) == (config, generation)
    assert tiny_tokenizer.pad_token is None
    assert torch.equal(torch.get_rng_state(), state)


def test_a_second_run_of_the_same_tasks_gives_the_same(task_set, tiny_tokenizer, results):
    assert run_tasks(tiny_model(), tiny_tokenizer, task_set, batch_size=4) == results


def test_a_model_does_not_flip_against_itself(results):
    for result in results.values():
        flips = count_flips(result, result)
        assert (flips.right_to_wrong, flips.wrong_to_right) == (0, 0)


def test_flips_explain_the_difference_of_the_values(results, task_set, tiny_tokenizer):
    other = run_tasks(tiny_model(seed=3), tiny_tokenizer, task_set, batch_size=4)
    assert any(results[name].outcomes != other[name].outcomes for name in TASKS)
    for name in TASKS:
        flips = count_flips(results[name], other[name])
        difference = (flips.wrong_to_right - flips.right_to_wrong) / flips.num_questions
        assert other[name].value - results[name].value == pytest.approx(difference)


def test_flips_need_answers_that_are_right_or_wrong(results):
    without = replace(results["piqa"], outcomes="")
    with pytest.raises(ValueError, match="acc_norm of a question is not 0 or 1"):
        count_flips(without, without)


def test_results_come_back_from_json(results):
    answer = json.loads(json.dumps(tasks_answer(results, results)))
    assert {name: task_result(values) for name, values in answer["tasks"].items()} == results
    assert answer["flips"]["piqa"]["num_questions"] == 12
    assert "flips" not in tasks_answer(results, None)


def test_a_subject_reads_its_own_rows_of_the_group(task_set, results):
    assert task_set.sources["cmmlu_anatomy"] == "cmmlu/test.jsonl"
    assert results["cmmlu_anatomy"].num_questions == 12
    assert task_set.sources["copy_word"] == "copy_word.yaml"


# --- bad input


def test_papers_names_the_seven_tasks():
    assert spelled_out(["papers", "piqa"]) == [*PAPER_TASKS]
    with pytest.raises(ValueError, match="must name a task"):
        spelled_out([])


def test_an_unknown_task_is_told_with_the_nearest_names(tasks_dir):
    with pytest.raises(ValueError, match="task 'pica' is unknown.*piqa"):
        check_tasks(["pica"], tasks_dir=tasks_dir)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"limit": 0}, "limit=0 must be at least 1"),
        ({"limit": -2}, "limit=-2 must be at least 1"),
        ({"num_fewshot": -1}, "num_fewshot=-1 must be at least 0"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(tasks_dir, settings, message):
    with pytest.raises(ValueError, match=message):
        check_tasks(["piqa"], tasks_dir=tasks_dir, **settings)


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no directory; it must hold rows as"):
        check_tasks(["piqa"], tasks_dir=tmp_path / "none")


def test_without_rows_and_hub_the_missing_file_is_named(tmp_path):
    with pytest.raises(OSError, match=r"put piqa/validation.jsonl under .*or reach baber/piqa"):
        check_tasks(["piqa"], tasks_dir=tmp_path)


def test_examples_need_their_file(tasks_dir):
    with pytest.raises(FileNotFoundError, match=r"2 examples before .* piqa/train.jsonl|train"):
        check_tasks(["piqa"], tasks_dir=tasks_dir, num_fewshot=2)
    with pytest.raises(ValueError, match="num_fewshot=9 is more than the 2 examples"):
        check_tasks(["cmmlu_anatomy"], tasks_dir=tasks_dir, num_fewshot=9)


@pytest.mark.parametrize("row", [0, 3])
def test_a_row_that_lacks_a_field_is_named(tasks_dir, tmp_path, row):
    lines = (tasks_dir / "piqa/validation.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    del rows[row]["goal"]
    write_rows(tmp_path / "piqa/validation.jsonl", rows)
    with pytest.raises(
        ValueError, match=f"row {row + 1} of .*validation.jsonl lacks the field 'goal'"
    ):
        check_tasks(["piqa"], tasks_dir=tmp_path)


def test_a_field_that_the_task_does_not_read_may_be_absent(tasks_dir, tmp_path):
    lines = (tasks_dir / "arc_easy/test.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    del rows[2]["id"]
    write_rows(tmp_path / "arc_easy/test.jsonl", rows)
    assert check_tasks(["arc_easy"], tasks_dir=tmp_path).sources == {
        "arc_easy": "arc_easy/test.jsonl"
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no row"),
        ("{", "row 1 of .* is not JSON"),
        ("[1]", "row 1 of .* must be a JSON object"),
        ('{"goal": "a", "sol1": "b", "sol2": "c", "label": 0}\n{"goal": 7}', "values of one kind"),
    ],
)
def test_a_file_that_holds_no_rows_is_told(tmp_path, text, message):
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa/validation.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        check_tasks(["piqa"], tasks_dir=tmp_path)


def test_rows_of_a_group_need_their_subject(tmp_path):
    write_rows(tmp_path / "cmmlu/test.jsonl", [{"Question": "w4"}])
    with pytest.raises(ValueError, match="lacks the field 'subject'"):
        check_tasks(["cmmlu_anatomy"], tasks_dir=tmp_path)


def test_prompts_that_are_cut_are_counted(task_set, tiny_tokenizer, caplog):
    run_tasks(tiny_model(max_position_embeddings=64), tiny_tokenizer, task_set)
    assert "their beginning is cut off" not in caplog.text
    run_tasks(tiny_model(max_position_embeddings=8), tiny_tokenizer, task_set)
    found = re.search(r"(\d+) of (\d+) prompts are longer than the 8 tokens", caplog.text)
    assert 0 < int(found[1]) <= int(found[2])


@pytest.mark.parametrize(
    ("task", "message"), [("piqa", "an answer has"), ("copy_word", "asks for")]
)
def test_an_answer_that_is_longer_than_the_model_reads_is_told(
    task, message, tasks_dir, tiny_tokenizer
):
    short = tiny_model(max_position_embeddings=2)
    with pytest.raises(ValueError, match=f"{message} \\d tokens.* leave this task out"):
        run_tasks(short, tiny_tokenizer, check_tasks([task], tasks_dir=tasks_dir))


def test_a_chat_needs_a_template(tasks_dir, tiny_tokenizer, task_set):
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        check_tasks(
            ["piqa"], tasks_dir=tasks_dir, apply_chat_template=True, tokenizer=tiny_tokenizer
        )
    chat = replace(task_set, apply_chat_template=True)
    with pytest.raises(ValueError, match="needs a tokenizer with a chat template"):
        run_tasks(tiny_model(), tiny_tokenizer, chat, batch_size=4)


def test_lm_eval_is_asked_for_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'prunelight\[eval\]'"):
        check_lm_eval_installed()
