"""TextDataModule: windows, examples, masks and the order of training."""

import json
import logging

import pyarrow
import pyarrow.parquet
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from text_tokenizers import ALPACA, CHAT, CHATML, PAIR, make_tokenizer, sample

from prunelight.data.token_windows import calibration_windows, tokenize_documents
from prunelight.losses import IGNORED_LABEL
from prunelight.training.text_datamodule import TextDataModule, pad_examples

INSTRUCTIONS = [ALPACA, PAIR, {"prompt": "Nothing?", "response": ""}]


@pytest.fixture
def instructions(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in INSTRUCTIONS), encoding="utf-8")
    return str(path)


@pytest.fixture
def text(tmp_path):
    table = pyarrow.Table.from_pylist([{"body": sample("train")[i : i + 3000]} for i in (0, 3000)])
    pyarrow.parquet.write_table(table, tmp_path / "text.parquet")
    return str(tmp_path / "text.parquet")


def make_data(tokenizer=None, seq_len=64, **arguments):
    return TextDataModule(tokenizer or make_tokenizer(), seq_len=seq_len, **arguments)


def test_text_is_packed_into_full_windows_that_are_their_own_labels():
    data = make_data(batch_size=8)
    data.setup("validate")
    batches = list(data.val_dataloader())
    stream = tokenize_documents(data.tokenizer, [sample("validation")])
    tokens = torch.cat([batch["input_ids"] for batch in batches])
    assert tokens.flatten().tolist() == stream[: len(stream) // 64 * 64].tolist()
    for batch in batches:
        assert torch.equal(batch["input_ids"], batch["labels"])
        assert batch["attention_mask"].all()
        assert all(tensor.dtype == torch.long for tensor in batch.values())


def test_validation_windows_are_the_batches_of_the_validation_and_the_test_loader():
    data = make_data(num_validation=5, batch_size=2)
    windows = data.validation_windows()
    assert windows.shape == (5, 64)
    for loader in (data.val_dataloader(), data.test_dataloader()):
        assert torch.equal(torch.cat([batch["input_ids"] for batch in loader]), windows)


def test_calibration_needs_no_setup_and_equals_the_function():
    data = make_data(num_calibration=6, seed=5)
    expected = calibration_windows(data.tokenizer, sample("calibration"), 6, 64, seed=5)
    assert torch.equal(data.calibration_windows(), expected)
    assert torch.equal(data.calibration_windows(), expected)
    assert not torch.equal(make_data(num_calibration=6, seed=6).calibration_windows(), expected)


def test_each_of_several_calibration_sources_gives_the_same_number(tmp_path):
    (tmp_path / "short.txt").write_text("Of few words only. " * 200, encoding="utf-8")
    sources = ["sample:calibration", str(tmp_path / "short.txt")]
    data = make_data(calibration=sources, num_calibration=9, seed=5)
    windows = [tuple(window.tolist()) for window in data.calibration_windows()]
    of_each = [make_data(calibration=one).examples("calibration") for one in sources]
    parts = [{tuple(example[0].tolist()) for example in examples} for examples in of_each]
    assert [sum(window in part for window in windows) for part in parts] == [5, 4]
    assert [window in parts[0] for window in windows] != [True] * 5 + [False] * 4
    assert len(set(windows)) == 9
    with pytest.raises(ValueError, match=r"takes 49 examples of calibration='.*short.txt'"):
        make_data(calibration=sources, num_calibration=98).calibration_windows()
    with pytest.raises(ValueError, match="num_calibration=1 must be at least 2: each source"):
        make_data(calibration=sources, num_calibration=1).calibration_windows()


def test_the_default_samples_fill_the_default_windows():
    data = make_data(seq_len=512)
    data.setup()
    assert data.calibration_windows().shape == (32, 512)
    assert {"train", "validation", "calibration"} == set(data.describe()["counts"])


def test_every_window_starts_with_bos_for_gemma():
    tokenizer = make_tokenizer(bos_token="<bos>")
    data = make_data(tokenizer, num_validation=3)
    for windows in (data.calibration_windows(), data.validation_windows()):
        assert (windows[:, 0] == tokenizer.bos_token_id).all()


def test_sources_may_be_several_and_the_text_field_another(text):
    once = make_data(train=text, text_field="body").examples("train")
    twice = make_data(train=[text, text], text_field="body").examples("train")
    assert 2 * len(once) <= len(twice) <= 2 * len(once) + 1


def test_padding_is_masked_and_only_the_response_has_labels(instructions):
    tokenizer = make_tokenizer(pad_token="<pad>", chat_template=CHATML)
    data = make_data(tokenizer, validation=instructions, seq_len=256)
    (batch,) = data.val_dataloader()
    padding = batch["attention_mask"] == 0
    assert padding.any()
    assert (batch["input_ids"][padding] == tokenizer.pad_token_id).all()
    assert (batch["labels"][padding] == IGNORED_LABEL).all()
    replies = [tokenizer.decode(row[row != IGNORED_LABEL]) for row in batch["labels"]]
    assert replies == ["The sum is 3.</s>\n", " Paris.</s>\n"]
    windows = data.validation_windows()
    assert all(torch.equal(batch[name], windows[name]) for name in batch)


def test_instruction_calibration_gives_tokens_and_their_mask(instructions):
    windows = make_data(calibration=instructions, num_calibration=2, seq_len=256)
    windows = windows.calibration_windows()
    assert set(windows) == {"input_ids", "attention_mask"}
    assert windows["input_ids"].shape == windows["attention_mask"].shape
    assert len(windows["input_ids"]) == 2


def test_instruction_fields_win_over_a_text_field(tmp_path):
    path = tmp_path / "both.jsonl"
    path.write_text(json.dumps({"text": "not this", **CHAT}), encoding="utf-8")
    ((_, labels),) = make_data(train=str(path)).examples("train")
    assert labels[0] == IGNORED_LABEL


def test_dropped_rows_and_tokens_are_counted_in_one_line_each(instructions, caplog):
    with caplog.at_level(logging.INFO, logger="prunelight.training.text_datamodule"):
        data = make_data(train=[instructions, "sample:validation"], seq_len=256)
        data.setup("fit")
        data.setup("fit")
    lines = [line for line in caplog.messages if line.startswith("train")]
    assert len(lines) == 2
    assert any("tail of" in line for line in lines)
    assert any("3 instruction rows -> 2 examples" in line for line in lines)


@pytest.mark.parametrize(
    ("stage", "read"),
    [
        ("fit", {"train", "validation"}),
        ("validate", {"validation"}),
        ("test", {"validation"}),
        ("predict", set()),
    ],
)
def test_setup_reads_what_the_stage_needs_and_only_once(stage, read):
    data = make_data()
    data.setup(stage)
    assert set(data.describe()["counts"]) == read
    examples = {role: data.examples(role) for role in read}
    data.setup(stage)
    assert all(data.examples(role) is examples[role] for role in read)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [({"pad_token": "<pad>"}, "<pad>"), ({}, "</s>"), ({"eos_token": None}, "<s>")],
)
def test_padding_uses_the_pad_token_else_eos_else_zero(tokens, expected, instructions):
    tokenizer = make_tokenizer(**tokens)
    (batch,) = make_data(tokenizer, validation=instructions, seq_len=256).val_dataloader()
    padding = batch["input_ids"][batch["attention_mask"] == 0]
    assert set(tokenizer.convert_ids_to_tokens(padding)) == {expected}


def test_padding_examples_of_one_length_changes_nothing():
    window = torch.arange(4)
    batch = pad_examples([(window, window)], pad_token_id=9)
    assert batch["input_ids"].tolist() == batch["labels"].tolist() == [[0, 1, 2, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1]]


class Recorder(LightningModule):
    """Keeps the tokens of every training batch, by epoch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = {}

    def training_step(self, batch):
        self.seen.setdefault(self.current_epoch, []).extend(map(tuple, batch["input_ids"].tolist()))
        return self.weight

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(text, epochs, tmp_path, seed=0, ckpt_path=None):
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    module = Recorder()
    data = make_data(train=text, text_field="body", seed=seed)
    trainer.fit(module, train_dataloaders=None, datamodule=data, ckpt_path=ckpt_path)
    return module.seen, trainer


def test_training_order_depends_on_seed_and_epoch_so_a_resumed_run_sees_the_same(text, tmp_path):
    whole, _ = fit(text, 2, tmp_path)
    first, trainer = fit(text, 1, tmp_path)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    rest, _ = fit(text, 2, tmp_path, ckpt_path=tmp_path / "one.ckpt")
    assert {**first, **rest} == whole
    assert whole[0] != whole[1]
    assert sorted(whole[0]) == sorted(whole[1])
    assert fit(text, 1, tmp_path, seed=1)[0][0] != whole[0]


def test_description_is_plain_json():
    data = make_data(num_validation=4)
    data.setup("validate")
    facts = data.describe()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["sources"]["train"] == "sample:train"
    assert facts["counts"] == {"validation": {"examples": 4, "tokens": 256}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seq_len": 1}, "seq_len=1 must be at least 2"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"num_calibration": 0}, "num_calibration=0 must be at least 1"),
        ({"num_validation": 0}, "num_validation=0 must be at least 1"),
        ({"bos": "always"}, "bos='always' needs a tokenizer with a BOS token"),
    ],
)
def test_bad_arguments_are_named_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_data(**arguments)


def test_too_few_validation_examples_are_named():
    data = make_data(num_validation=10_000)
    with pytest.raises(ValueError, match=r"holds \d+ examples .* but 10000 must be there; give"):
        data.validation_windows()


def test_a_source_too_short_for_one_window_is_named(tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("Too short.", encoding="utf-8")
    with pytest.raises(ValueError, match=r"train='.*short.txt' holds 0 examples of seq_len=64"):
        make_data(train=str(path)).setup("fit")


def test_too_few_calibration_windows_are_named():
    with pytest.raises(
        ValueError,
        match=r"num_calibration=9999 takes 9999 examples of calibration='sample.* holds \d+ at",
    ):
        make_data(num_calibration=9999).calibration_windows()


def test_calibration_and_validation_may_have_windows_of_their_own_length():
    plain = make_data(num_calibration=3, num_validation=2)
    data = make_data(
        num_calibration=3, num_validation=2, calibration_seq_len=32, validation_seq_len=96
    )
    assert data.calibration_windows().shape == (3, 32)
    assert data.validation_windows().shape == (2, 96)
    assert [len(ids) for ids, _ in data.examples("train")[:2]] == [64, 64]
    assert data.describe_training() == plain.describe_training()
    assert data.describe_validation() != plain.describe_validation()
    told = {"calibration_seq_len": 32, "validation_seq_len": 96}
    assert {name: value for name, value in data.describe().items() if name in told} == told
    assert not told.keys() & plain.describe().keys()
    own = make_data(seq_len=32, num_calibration=3).calibration_windows()
    assert data.calibration_windows().equal(own)


@pytest.mark.parametrize("name", ["calibration_seq_len", "validation_seq_len"])
def test_a_length_of_its_own_is_checked_and_named(name):
    with pytest.raises(ValueError, match=f"{name}=1 must be at least 2"):
        make_data(**{name: 1})
    data = make_data(num_calibration=10_000, num_validation=10_000, **{name: 32})
    with pytest.raises(ValueError, match=f"{name}=32"):
        data.calibration_windows() if name.startswith("c") else data.validation_windows()


def test_instructions_keep_to_the_length_of_their_role(instructions):
    data = make_data(validation=instructions, train=instructions, seq_len=400)
    short = make_data(
        validation=instructions, train=instructions, seq_len=400, validation_seq_len=24
    )
    assert max(len(ids) for ids, _ in data.examples("validation")) > 24
    with pytest.raises(ValueError, match="0 examples of validation_seq_len=4 "):
        make_data(validation=instructions, seq_len=400, validation_seq_len=4).validation_windows()
    assert all(len(ids) <= 24 for ids, _ in short.examples("validation"))
    assert len(short.examples("train")) == len(data.examples("train"))
