"""The checks of a run are made before each fit, whatever the Trainer did before."""

import pytest
from lightning.pytorch import Callback
from runs import make_data, make_module, make_trainer, write_model

from prunelight.callbacks import DLP, ShortGPT, SliceGPT
from prunelight.training.trainer import Trainer


@pytest.fixture(scope="module")
def name(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def quiet_trainer(root, *callbacks):
    settings = {"logger": False, "enable_progress_bar": False, "max_steps": 1, "devices": 1}
    return Trainer(accelerator="cpu", default_root_dir=root, callbacks=[*callbacks], **settings)


def foreign_report(root):
    (root / "report.md").write_text("mine")


def test_a_fit_after_a_validation_is_checked(name, tmp_path):
    module, data, trainer = make_module(name), make_data(name, tmp_path), make_trainer(tmp_path)
    trainer.validate(module, data, verbose=False)
    foreign_report(tmp_path)
    with pytest.raises(FileExistsError, match="report.md exists and was not written by"):
        trainer.fit(module, data)


def test_a_fit_after_a_fit_is_checked(name, tmp_path):
    module, data = make_module(name), make_data(name, tmp_path)
    trainer = make_trainer(tmp_path / "run", max_epochs=1)
    trainer.fit(module, data)
    foreign_report(tmp_path / "run")
    with pytest.raises(FileExistsError, match="report.md exists and was not written by"):
        trainer.fit(module, data)


def test_pruning_after_a_validation_is_checked(name, tmp_path):
    trainer = quiet_trainer(tmp_path, DLP(0.5), SliceGPT(slice_ratio=0.25))
    module, data = make_module(name, recovery="none"), make_data(name, tmp_path)
    trainer.validate(module, data, verbose=False)
    with pytest.raises(ValueError, match="SliceGPT"):
        trainer.prune(module, data)
    assert not [*tmp_path.glob("pruned-*")]


def test_a_fit_after_prune_only_is_checked(name, tmp_path):
    module, data = make_module(name), make_data(name, tmp_path)
    trainer = quiet_trainer(tmp_path, ShortGPT(num_layers=1))
    trainer.prune(module, data)
    foreign_report(tmp_path)
    with pytest.raises(FileExistsError, match="report.md exists and was not written by"):
        trainer.fit(module, data, ckpt_path=None)


def test_a_prediction_needs_no_place_for_a_report(name, tmp_path):
    module, data, trainer = make_module(name), make_data(name, tmp_path), make_trainer(tmp_path)
    foreign_report(tmp_path)
    data.setup("fit")
    module.predict_step = lambda batch, *_: module(batch["input_ids"])
    logits = trainer.predict(module, data.val_dataloader())
    assert sum(len(rows) for rows in logits) == 3


def test_a_model_from_a_checkpoint_is_checked_against_the_precision(name, tmp_path):
    module, data = make_module(name, recovery="full"), make_data(name, tmp_path)
    make_trainer(tmp_path, max_epochs=1).fit(module, data)
    (checkpoint,) = (tmp_path / "checkpoints").glob("*.ckpt")
    loaded = type(module).load_from_checkpoint(checkpoint, name=name, recovery="full")
    make_trainer(tmp_path / "second", max_epochs=1, precision="bf16-true").fit(loaded, data)
    assert "casts torch.float32 weights to torch.bfloat16" in loaded.run.precision_losses[0]


def test_pruning_alone_does_not_mind_what_only_training_forbids(name, tmp_path):
    module = make_module(name, recovery="full", dtype="float16")
    trainer = quiet_trainer(tmp_path, ShortGPT(num_layers=1))
    assert trainer.precision == "32-true"
    trainer.prune(module, make_data(name, tmp_path))
    assert module.run.precision_losses == []


def test_an_adapter_directory_that_is_not_ours_is_kept(name, tmp_path):
    class Writes(Callback):
        def on_train_start(self, trainer, pl_module):
            (tmp_path / "adapter").mkdir()
            (tmp_path / "adapter" / "mine.txt").write_text("mine")

    module = make_module(name, keep_zeros=False)
    with pytest.raises(FileExistsError, match="adapter"):
        make_trainer(tmp_path, DLP(0.5), Writes()).fit(module, make_data(name, tmp_path))
    assert (tmp_path / "adapter" / "mine.txt").read_text() == "mine"


def test_a_sibling_has_what_was_set_on_the_module(name):
    module = make_module(name)
    module.learning_rate = 3e-4
    sibling = module.sibling(quantization="none")
    assert sibling.learning_rate == 3e-4
    assert sibling.name == name


class AlmostMethod(Callback):
    """Plans and applies, as a method written before `layers_left` was asked for."""

    version, device, gradual, slices = 1, None, False, False
    follows_slicing, puts_zeros, drops_sublayers, export_remote_code = True, False, False, False

    def plan(self, model, windows): ...

    def apply(self, model, plan, windows, outcomes): ...


def test_a_method_that_lacks_a_part_is_named_instead_of_left_out(name, tmp_path):
    trainer = quiet_trainer(tmp_path, AlmostMethod(), ShortGPT(num_layers=1))
    lacks = r"AlmostMethod lacks arguments, check_run, check, layers_left, .*derive it from"
    with pytest.raises(TypeError, match=lacks):
        trainer.fit(make_module(name), make_data(name, tmp_path))
