"""README and docs: links, tables, commands, YAML and Python in them hold, and the site builds."""

import ast
import importlib
import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from source_tree import ROOT
from tiny import FAMILIES, NUM_LAYERS, tiny_model, token_windows

import prunelight
import prunelight.callbacks
from prunelight.callbacks import ShortGPT, WeightPruning, WidthPruning
from prunelight.cli import COMMANDS, main
from prunelight.commands.plan import flat_arguments
from prunelight.lightning_cli import CLI, find_configs
from prunelight.models.families.architectures import ARCHITECTURES
from prunelight.models.families.layers import decoder_layers
from prunelight.models.families.matrices import lora_targets
from prunelight.planning.steps import step_from_dict
from prunelight.training.recovery_module import RecoveryModule
from prunelight.training.text_datamodule import TextDataModule
from prunelight.training.trainer import Trainer

DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
CARDS = sorted((DOCS / "methods").glob("*.md"))
MOST_LINES = 130  # of the README

LINK = re.compile(r"(?<!\\)\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
SCRIPT = re.compile(r"python (?:-m pytest )?((?:tests|docs)/[\w/.]+\.py)(.*)")
HEADINGS = [
    "Use it",
    "Suggested values",
    "What it does",
    "Where we differ from the paper's code",
    "Measured",
    "Cite",
]


def name_of(page):
    return str(page.relative_to(ROOT))


def each_page(pages):
    return pytest.mark.parametrize("page", pages, ids=name_of)


def read(page):
    return page.read_text(encoding="utf-8")


def fences(language):
    """All fenced blocks of a language, as pytest parameters: (page, its text)."""
    return [
        pytest.param(match[2], id=f"{name_of(page)}-{number}")
        for page in PAGES
        for number, match in enumerate(FENCE.finditer(read(page)))
        if match[1] == language
    ]


def first_block(name):
    """The code of the first Python block of a page of docs."""
    text = next(m[2] for m in FENCE.finditer(read(DOCS / name)) if m[1] == "python")
    return compile(text, name, "exec")


def shell_lines():
    """Each line of code that a reader may copy, from shell blocks and inline: (page, line)."""
    for page in PAGES:
        text = read(page)
        for match in FENCE.finditer(text):
            if match[1] == "bash":
                for line in match[2].replace("\\\n", " ").splitlines():
                    yield page, line
        for match in INLINE.finditer(FENCE.sub("", text)):
            yield page, match[1]


def commands():
    """Each different `prunelight ...` command of README and docs; NAME stands for any name."""
    found = {}
    for page, line in shell_lines():
        for part in re.split(r"&&", line):
            words = shlex.split(part, comments=True)
            if words[:1] == ["prunelight"] and len(words) > 1 and "NAME.yaml" not in words:
                found.setdefault(tuple(words[1:]), page)
    return [
        pytest.param(list(words), id=f"{name_of(page)}: {' '.join(words)[:60]}")
        for words, page in found.items()
    ]


def scripts():
    """Each different command that runs one of our scripts or test files: (script, its words)."""
    found = {}
    for page, line in shell_lines():
        match = SCRIPT.search(line)
        if match:
            found.setdefault((match[1], match[2].strip()), page)
    return [
        pytest.param(script, rest, id=f"{name_of(page)}: {script} {rest}"[:80])
        for (script, rest), page in found.items()
    ]


class _ParserMade(Exception):
    """Carries the parser of the command line out of it, before anything is parsed."""


@cache
def parser():
    """The parser of the command line."""

    class ParserOnly(CLI):
        def parse_arguments(self, parser, args):
            raise _ParserMade(parser)

    with pytest.raises(_ParserMade) as made:
        ParserOnly(
            RecoveryModule,
            TextDataModule,
            trainer_class=Trainer,
            parser_kwargs={"prog": "prunelight"},
            auto_configure_optimizers=False,
        )
    return made.value.args[0]


def parse(words, capsys):
    """Parse a command as `prunelight` does, without running it."""
    shown = "--print_config" in words
    try:
        parser().parse_args(find_configs(words))
    except SystemExit as stopped:
        if stopped.code or not shown:
            pytest.fail(capsys.readouterr().err)


def script(*parts):
    """A script of the docs as a module."""
    spec = importlib.util.spec_from_file_location(Path(parts[-1]).stem, DOCS.joinpath(*parts))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def tables():
    """The module docs/results/tables.py."""
    return script("results", "tables.py")


def test_the_pages_of_the_papers_are_what_their_sources_give(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pages.py", "--check"])
    stale = script("papers", "pages.py").main()
    assert not stale, f"{capsys.readouterr().err}; run docs/papers/pages.py, then tables.py"


def test_the_readme_is_short():
    assert len(read(README).splitlines()) <= MOST_LINES


def test_a_reader_who_searches_for_a_well_known_method_finds_it_in_the_readme():
    for word in ("Wanda", "SparseGPT", "2:4", "OWL", "FLAP", "LLM-Pruner", "QLoRA", "FSDP2"):
        assert word in read(README)


@each_page(PAGES)
def test_relative_links_lead_somewhere(page):
    text = FENCE.sub("", read(page))
    for target in LINK.findall(text):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


def anchors(page):
    """The anchors that the headings of a page get."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", read(page)), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


@each_page(PAGES)
def test_tables_are_those_that_the_json_files_give(page):
    text = read(page)
    assert tables().written(text) == text, "run python docs/results/tables.py"


def test_every_json_file_of_results_is_shown_and_says_what_gave_it():
    shown = {name for page in PAGES for name, _ in tables().TABLE.findall(read(page))}
    assert shown == {file.stem for file in (DOCS / "results").glob("*.json")}
    for name in shown:
        table = tables().load(name)
        assert all(table[key] for key in ("commands", "date", "commit"))
        assert all(len(row) == len(table["columns"]) for row in table["rows"]), name


def test_a_table_takes_the_figures_of_a_run_from_its_report():
    dense = {"name": "dense", "num_layers": 6, "parameters": 2_000_000, "accuracy": 0.5}
    pruned = {**dense, "name": "pruned", "num_layers": 4, "parameters": 1_500_000}
    report = {"stages": [{**dense, "perplexity": 10.0}, {**pruned, "perplexity": 20.456}]}
    columns, rows = tables().stage_rows(report)
    table = {"columns": columns, "rows": rows, "commands": ["x"], "date": "today", "commit": "c"}
    assert tables().render(table).splitlines()[2:5] == [
        "| layers | 6 | 4 |",
        "| parameters | 2.0M | 1.5M (-25.0 %) |",
        "| perplexity | 10.00 | 20.46 |",
    ]


def test_the_best_figure_of_each_column_or_row_is_bold():
    rows = [["a", [3, 1.5], 7], ["b", [2, 9.0], None]]
    table = {"columns": ["", "x", "y"], "rows": rows, "commands": [], "date": "", "commit": ""}
    assert "| a | 3, **1.50** | **7** |\n| b | **2**, 9.00 |  |" in tables().render(
        {**table, "best": "column"}
    )
    assert "| a | **3**, **1.50** | 7 |\n| b | **2**, **9.00** |  |" in tables().render(
        {**table, "best": "row"}
    )


COUNTED = "<!-- table: memory -->"  # of shapes, not measured with a model


@each_page([page for page in PAGES if "<!-- table:" in read(page).replace(COUNTED, "")])
def test_a_page_with_figures_says_which_model_they_are_from(page):
    for word in ("Instruct", "Q4_1", "CPU"):
        assert word in read(page)


@pytest.mark.parametrize("words", commands())
def test_commands_parse(words, capsys):
    if words[0] == "families":  # it takes no config; tests/pruning/test_abilities.py runs it
        assert len(words) <= 2
        return
    if words[0] == "plan":  # its options are those of the method, or of show and diff
        with pytest.raises(SystemExit):
            main([*words, "--help"])
        told = re.findall(r"--[\w.]+", capsys.readouterr().out)
        assert {word for word in flat_arguments(words) if word.startswith("--")} <= {*told}
        return
    if words[0] in COMMANDS:  # each has a parser of its own
        # `reproduce` hands what it does not know itself to `compare`.
        for verb in (words[0], *(["compare"] if words[0] == "reproduce" else [])):
            with pytest.raises(SystemExit):
                main([verb, "--help"])
        told = re.findall(r"--[\w.]+", capsys.readouterr().out)
        assert {word for word in words if word.startswith("--")} <= {*told}
        return
    parse(words, capsys)


@pytest.mark.parametrize("text", fences("yaml"))
def test_yaml_blocks_parse_as_configs(text, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(text, encoding="utf-8")
    named = yaml.safe_load(text).get("model", {}).get("name")
    parse(
        ["fit", "--config", str(config), *([] if named else ["--model.name", "smollm2-135m"])],
        capsys,
    )


@pytest.mark.parametrize(("script", "rest"), scripts())
def test_scripts_exist_and_know_the_options_that_are_named(script, rest):
    file = ROOT / script
    known = read(file) + (
        read(file.with_name("common.py")) if file.parent.name == "benchmarks" else ""
    )
    for option in re.findall(r"(?<!\S)--[\w-]+", rest) if "pytest" not in rest else []:
        argument = option.lstrip("-").replace("-", "_")
        assert f'"{option}"' in known or re.search(rf"^ +run\(.*\b{argument}=", known, re.M), option


@pytest.mark.parametrize("text", fences("python"))
def test_python_blocks_compile_and_their_imports_resolve(text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module}.{alias.name}"
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "prunelight"
        ):
            assert hasattr(prunelight, node.attr), f"prunelight.{node.attr}"


@pytest.mark.parametrize("text", fences("json"))
def test_json_blocks_are_json_and_their_steps_are_known(text):
    value = yaml.safe_load(text)  # JSON is YAML
    for step in value["steps"] if isinstance(value, dict) else value:
        step_from_dict(step)


@each_page(CARDS)
def test_a_card_has_the_headings_of_all_cards(page):
    assert re.findall(r"^## (.+)$", FENCE.sub("", read(page)), re.MULTILINE) == HEADINGS


@each_page(CARDS)
def test_the_values_of_a_card_are_those_of_the_class(page):
    title = re.match(r"# (\w+)", read(page))[1]
    defaults = inspect.signature(getattr(prunelight.callbacks, title)).parameters
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", read(page), re.MULTILINE)
    for name, value in rows:
        default = defaults[name].default
        assert value in (str(default), f"{type(default).__name__}()"), name
    deprecated = {"outlier_factor"} if title == "DLP" else set()
    assert defaults.keys() - {name for name, _ in rows} == deprecated


def test_every_method_has_a_card():
    no_methods = {"PruningCallback", "SlicingCallback"}
    methods = {
        name
        for name in prunelight.callbacks.__all__
        if issubclass(getattr(prunelight.callbacks, name), prunelight.callbacks.PruningCallback)
    }
    titles = {re.match(r"# (\w+)", read(card))[1] for card in CARDS}
    assert methods - no_methods == titles


def test_the_page_on_models_lists_every_config():
    listed = set(re.findall(r"`(\w+)`", read(DOCS / "your-model.md").partition("## Model")[0]))
    configs = {file.stem for file in (ROOT / "configs").rglob("*.yaml")}
    assert configs <= listed


def test_the_method_of_add_a_method_prunes_a_model():
    space = {"__name__": "random_layers"}
    exec(first_block("add-a-method.md"), space)
    model, windows = tiny_model(), token_windows()
    plan = space["RandomLayers"](2).plan(model, windows)
    assert len(decoder_layers(prunelight.apply(model, plan))) == NUM_LAYERS - 2
    with pytest.raises(ValueError, match="num_layers=6"):
        space["RandomLayers"](NUM_LAYERS).check(model)


def test_the_family_of_add_a_family_is_pruned_by_its_one_entry(monkeypatch):
    monkeypatch.setitem(FAMILIES, "ernie4_5", {})
    model, windows = tiny_model("ernie4_5"), token_windows()
    narrow = WidthPruning(neuron_ratio=0.5, multiple=8)
    with pytest.raises(TypeError, match="ernie4_5"):
        narrow.plan(model, windows)
    monkeypatch.setitem(ARCHITECTURES, "ernie4_5", None)  # so that the entry goes at the end
    exec(first_block("add-a-family.md"), {})
    for method in (ShortGPT(num_layers=2), narrow, WeightPruning(0.5)):
        model = prunelight.apply(model, method.plan(model, windows), windows)
    assert torch.isfinite(model(windows).logits).all()
    assert model.config.intermediate_size == 32
    assert set(lora_targets(model)[0]) == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }


def test_the_citation_names_the_four_papers():
    citation = yaml.safe_load(read(ROOT / "CITATION.cff"))
    cited = {item["value"] for entry in citation["references"] for item in entry["identifiers"]}
    assert citation["cff-version"] == "1.2.0"
    assert {"2403.03853", "2411.03513", "2502.19159", "2505.23807"} <= {
        value.removeprefix("arXiv:") for value in cited
    }


def test_the_site_builds_without_a_warning(tmp_path):
    for name in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(name, reason="the documentation needs pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )
    assert built.returncode == 0, built.stderr
    assert Path(tmp_path, "api", "index.html").exists()
