"""A LightningModule and a LightningDataModule of the user's own prune, train, resume and save."""

import json
from itertools import cycle

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from peft import LoraConfig, get_peft_model
from runs import make_data, make_module, make_trainer, write_model
from text_tokenizers import make_tokenizer
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoModelForCausalLM

from prunelight.calibration.data_windows import calibration_windows_of
from prunelight.callbacks import DLP, ShortGPT, SliceGPT, WeightPruning
from prunelight.models.families.matrices import matrices
from prunelight.models.loading import load
from prunelight.models.sizes import zero_share
from prunelight.recovery.zeros.gradual_zeros import Schedule

WIDTH = 16


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


class OwnModule(pl.LightningModule):
    """Trains all weights by the loss of transformers, and knows nothing of prunelight."""

    def __init__(self, name):
        super().__init__()
        self.name, self.model, self.tokenizer = name, None, make_tokenizer(bos_token="<s>")

    def setup(self, stage):
        if self.model is None:
            self.model = AutoModelForCausalLM.from_pretrained(self.name)

    def training_step(self, batch, batch_idx):
        return self.model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        parameters = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(parameters, lr=1e-2)


class OwnAdapters(OwnModule):
    """Attaches adapters after the pruning."""

    def configure_model(self):
        if not hasattr(self.model, "peft_config"):
            targets = ["q_proj", "v_proj"]
            config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets)
            self.model = get_peft_model(self.model, config)


class OwnData(pl.LightningDataModule):
    """Has dataloaders only."""

    def __init__(self, rows=12):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.rows = torch.randint(5, 60, (rows, WIDTH), generator=generator)

    def _loader(self, rows):
        return DataLoader([{"input_ids": row, "labels": row} for row in rows], batch_size=2)

    def train_dataloader(self):
        return self._loader(self.rows[:8])

    def val_dataloader(self):
        return self._loader(self.rows[8:])


def fit(module, root, *callbacks, data=None, **arguments):
    ckpt_path = arguments.pop("ckpt_path", None)
    trainer = make_trainer(root, *callbacks, **arguments)
    trainer.fit(module, data or OwnData(), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def report_of(root):
    return json.loads((root / "report.json").read_text())


def test_an_own_module_with_own_data_prunes_trains_and_saves(name, tmp_path):
    module = OwnModule(name)
    fit(module, tmp_path, ShortGPT(num_layers=2))
    report = report_of(tmp_path)
    assert [stage["name"] for stage in report["stages"]] == ["dense", "pruned", "recovered"]
    assert [stage["num_layers"] for stage in report["stages"]] == [6, 4, 4]
    assert report["recovery"]["mode"] == "OwnModule"
    assert report["plans"][0]["calibration"]["num_samples"] == 8
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    ids = OwnData().rows[:2]
    with torch.no_grad():
        torch.testing.assert_close(final(ids).logits, module.model(ids).logits)


def test_training_changes_what_was_pruned(name, tmp_path):
    fit(OwnModule(name), tmp_path, ShortGPT(num_layers=2))
    (base,) = tmp_path.glob("pruned-*")
    pruned, final = (AutoModelForCausalLM.from_pretrained(x) for x in (base, tmp_path / "final"))
    changed = [
        not torch.equal(a, b) for a, b in zip(pruned.parameters(), final.parameters(), strict=True)
    ]
    assert all(changed)


def test_a_resumed_run_scores_no_second_time_and_ends_like_a_whole_one(name, tmp_path, caplog):
    pl.seed_everything(0, verbose=False)
    whole = OwnModule(name)
    fit(whole, tmp_path / "whole", ShortGPT(num_layers=2))
    pl.seed_everything(0, verbose=False)
    fit(OwnModule(name), tmp_path / "run", ShortGPT(num_layers=2), max_epochs=1)
    pl.seed_everything(1, verbose=False)
    resumed = OwnModule(name)
    with caplog.at_level("INFO", logger="prunelight"):
        checkpoint = tmp_path / "run" / "checkpoints" / "epoch=0.ckpt"
        fit(resumed, tmp_path / "run", ShortGPT(num_layers=2), ckpt_path=checkpoint)
    assert "reusing" in caplog.text
    for own, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("kind", [OwnModule, OwnAdapters])
def test_planned_zeros_stay_zero(kind, name, tmp_path):
    fit(kind(name), tmp_path, WeightPruning(0.5))
    model, _ = load(tmp_path / "final")
    assert zero_share(m.parameter for m in matrices(model).values()) == pytest.approx(0.5, abs=0.01)


def test_adapters_of_the_users_own_are_merged(name, tmp_path):
    fit(OwnAdapters(name), tmp_path, ShortGPT(num_layers=1))
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert not any("lora" in key for key in final.state_dict())
    (base,) = tmp_path.glob("pruned-*")
    pruned = AutoModelForCausalLM.from_pretrained(base).state_dict()
    changed = {key for key, value in final.state_dict().items() if not value.equal(pruned[key])}
    assert changed
    assert all("q_proj" in key or "v_proj" in key for key in changed)


def test_loaders_given_to_fit_serve_as_data(name, tmp_path):
    module, data = OwnModule(name), OwnData()
    trainer = make_trainer(tmp_path, ShortGPT(num_layers=2))
    trainer.fit(module, data.train_dataloader(), data.val_dataloader())
    assert report_of(tmp_path)["stages"][-1]["num_layers"] == 4


def test_a_model_that_is_there_before_setup_is_pruned_too(name, tmp_path):
    module = OwnModule(name)
    module.model = AutoModelForCausalLM.from_pretrained(name)
    fit(module, tmp_path, SliceGPT(0.25, embedding="full"), data=make_data(name, tmp_path))
    assert module.model.config.residual_dims


def test_a_second_fit_goes_on_with_the_pruned_model(name, tmp_path):
    module, callback = OwnModule(name), ShortGPT(num_layers=2)
    fit(module, tmp_path, callback, max_epochs=1)
    fit(module, tmp_path / "again", callback, max_epochs=1)
    assert module.model.config.num_hidden_layers == 4
    assert (tmp_path / "again" / "final").is_dir()
    assert not [*(tmp_path / "again").glob("pruned-*")]


def test_a_recovery_module_takes_own_data_too(name, tmp_path):
    module = make_module(name)
    fit(module, tmp_path, ShortGPT(num_layers=2), data=Labelled())
    assert [stage.name for stage in module.record.stages] == ["dense", "pruned", "recovered"]


class Labelled(OwnData):
    """With the labels that a RecoveryModule wants."""

    def _loader(self, rows):
        batches = [{"input_ids": row, "labels": row} for row in rows]
        return DataLoader(batches, batch_size=2)


def test_a_training_batch_that_the_model_cannot_read_is_refused(name, tmp_path):
    data = Labelled()
    data.rows[3, 5] = 100_000  # a training row
    with pytest.raises(ValueError, match=r"token id 100000 must lie in \[0, "):
        fit(make_module(name), tmp_path, data=data)


# --- what is refused --------------------------------------------------------------------------


class NoModel(OwnModule):
    def setup(self, stage):
        pass


class NoTransformer(OwnModule):
    def setup(self, stage):
        self.model = torch.nn.Linear(2, 2)


class AdaptersTooEarly(OwnAdapters):
    def setup(self, stage):
        super().setup(stage)
        self.configure_model()


class NoTokenizer(OwnModule):
    def __init__(self, name):
        super().__init__(name)
        self.tokenizer = None


@pytest.mark.parametrize(
    ("kind", "callback", "message"),
    [
        (NoModel, ShortGPT(num_layers=1), "NoModel.model is missing; .*PreTrainedModel as `model`"),
        (NoTransformer, ShortGPT(num_layers=1), "NoTransformer.model is Linear; .*PreTrainedModel"),
        (AdaptersTooEarly, ShortGPT(num_layers=1), "has adapters .* attach them in configure_mod"),
        (NoTokenizer, ShortGPT(num_layers=1), "neither NoTokenizer nor its data has a `tokenizer`"),
        (OwnModule, DLP(0.5, schedule=Schedule(0, 2)), "this is a OwnModule; prune at fit start"),
    ],
)
def test_what_is_missing_is_told_in_one_line(kind, callback, message, name, tmp_path):
    with pytest.raises((TypeError, ValueError), match=message) as error:
        fit(kind(name), tmp_path, callback)
    assert "\n" not in str(error.value)
    assert not [*tmp_path.glob("pruned-*")]


class OtherBatches(OwnData):
    def _loader(self, rows):
        return DataLoader(rows, batch_size=2)


class NoValidation(pl.LightningDataModule):
    def train_dataloader(self):
        return OwnData().train_dataloader()


class ListOfLoaders(OwnData):
    def val_dataloader(self):
        return [super().val_dataloader(), super().val_dataloader()]


class EndlessValidation(OwnData):
    def val_dataloader(self):
        return DataLoader(EndlessRows(), batch_size=2)


class EndlessRows(IterableDataset):
    def __iter__(self):
        return ({"input_ids": row, "labels": row} for row in cycle(OwnData().rows))


class Shuffled(OwnData):
    def _loader(self, rows):
        return DataLoader([{"input_ids": row} for row in rows], batch_size=2, shuffle=True)


def test_batches_without_token_ids_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match=r"train_dataloader\(\) gives .* Tensor; .*input_ids"):
        fit(OwnModule(name), tmp_path, ShortGPT(num_layers=1), data=OtherBatches())


@pytest.mark.parametrize("bare", [False, True])
def test_pruning_without_validation_batches_is_refused(bare, name, tmp_path):
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        logger=False,
        callbacks=[ShortGPT(num_layers=1), ModelCheckpoint(dirpath=tmp_path)],
        enable_progress_bar=False,
        accelerator="cpu",
    )
    data = NoValidation().train_dataloader() if bare else None
    with pytest.raises(ValueError, match=r"pruning needs data: .* val_dataloader\(\)"):
        trainer.fit(OwnModule(name), data, datamodule=None if bare else NoValidation())


@pytest.mark.parametrize(
    ("data", "samples"),
    [(NoValidation, None), (ListOfLoaders, 4), (EndlessValidation, 6)],
)
def test_a_recovery_measures_what_the_data_gives(data, samples, name, tmp_path):
    module = make_module(name, warmup_steps=0)
    limit = 3 if data is EndlessValidation else 1.0
    fit(module, tmp_path, data=data(), limit_val_batches=limit, max_steps=1)
    if samples is None:
        assert module.record is None
    else:
        assert module.record.evaluation["num_samples"] == samples
    assert (tmp_path / "final" / "config.json").is_file()


def test_windows_of_a_shuffled_dataloader_are_the_same_at_every_start_and_move_no_generator():
    torch.manual_seed(1)
    first = calibration_windows_of(Shuffled())
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn)
    assert torch.equal(calibration_windows_of(Shuffled()), first)


def test_a_trainer_may_train_a_second_module(name, tmp_path):
    first, second = OwnModule(name), OwnModule(name)
    trainer = fit(first, tmp_path, WeightPruning(0.5), max_epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(second, OwnData(), weights_only=True)
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    ids = OwnData().rows[:2]
    with torch.no_grad():
        torch.testing.assert_close(final(ids).logits, second.model(ids).logits)


class FailsAtSetup(Callback):
    def setup(self, trainer, pl_module, stage):
        raise OSError("no room")


def test_a_start_that_failed_can_be_repeated(name, tmp_path):
    module = OwnModule(name)
    with pytest.raises(OSError, match="no room"):
        fit(module, tmp_path, ShortGPT(num_layers=1), FailsAtSetup())
    fit(module, tmp_path, ShortGPT(num_layers=1), max_epochs=1)
    assert (tmp_path / "final").is_dir()


def test_lost_precision_is_told(name, tmp_path):
    fit(OwnModule(name), tmp_path, ShortGPT(num_layers=1), max_epochs=1, precision="bf16-true")
    assert "bfloat16" in " ".join(report_of(tmp_path)["warnings"])


def test_frozen_parameters_are_warned_of(name, tmp_path, caplog):
    module = OwnModule(name)
    module.model = AutoModelForCausalLM.from_pretrained(name)
    module.model.get_input_embeddings().weight.requires_grad_(False)
    fit(module, tmp_path, ShortGPT(num_layers=1), max_epochs=1)
    assert "has 1 frozen parameters" in caplog.text
