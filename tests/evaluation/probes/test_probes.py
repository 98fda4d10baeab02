"""Collapse probes: what they ask, what they cost, and that they see what perplexity hides."""

import copy

import pytest
import torch
from probed_models import POSITIONS, knowing_model, text_windows, train
from text_tokenizers import CHATML, make_tokenizer
from tiny import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from prunelight.evaluation.perplexity import perplexity
from prunelight.evaluation.probes.dense_divergence import LONG_TOKENS
from prunelight.evaluation.probes.probing import MOST_TOKENS, probe_rows, run_probes
from prunelight.evaluation.probes.questions import QUESTIONS
from prunelight.evaluation.probes.results import (
    PROBES,
    WELL,
    ProbeResult,
    compare_probes,
    verdict,
)
from prunelight.evaluation.probes.samples import NEW_TOKENS, PROMPTS, QUESTION, samples

QUICKSTART_TOKENS = 16 * 512  # of the calibration windows, whose forward is F


@pytest.fixture(scope="module")
def knowing():
    return knowing_model()


def letters_tokenizer():
    """One token a letter, and none for brackets."""
    letters = {chr(code): number for number, code in enumerate([10, 32, *range(97, 123)])}
    table = Tokenizer(models.WordLevel({**letters, "<unk>": len(letters)}, unk_token="<unk>"))
    table.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=table, unk_token="<unk>")


TOKENIZERS = {"bpe": make_tokenizer(), "letters": letters_tokenizer()}


@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
def test_all_probes_and_samples_cost_less_than_a_forward_of_the_calibration(tokenizer):
    rows = [row for name in QUESTIONS for row in probe_rows(name, tokenizer)]
    asked = sum(len(row.ids) for row in rows)
    prompts = [tokenizer.encode(text, add_special_tokens=False) for text in (*PROMPTS, QUESTION)]
    generated = sum(len(ids) + NEW_TOKENS for ids in prompts)
    assert asked + generated <= MOST_TOKENS
    assert MOST_TOKENS + LONG_TOKENS <= QUICKSTART_TOKENS


@pytest.mark.parametrize("name", QUESTIONS)
def test_the_tokens_that_are_asked_are_those_of_the_answers(name):
    tokenizer = TOKENIZERS["bpe"]
    lines = {
        part.text.strip()
        for line, _ in zip(QUESTIONS[name](), range(400), strict=False)
        for part in line
        if part.asked
    }
    places = [(row, place) for row in probe_rows(name, tokenizer) for place in row.places]
    if name == "brackets":
        assert not places, "a space and a bracket are one token, a space and a brace are two"
        return
    assert len(places) >= 12
    for row, place in places:
        assert tokenizer.decode(row.ids[place.start : place.stop]).strip() in lines
        assert not place.options or row.ids[place.start] in place.options


def test_questions_are_the_same_every_time():
    for name in QUESTIONS:
        assert probe_rows(name, TOKENIZERS["bpe"]) == probe_rows(name, TOKENIZERS["bpe"])


def test_an_answer_is_right_where_greedy_decoding_gives_it(knowing):
    model, tokenizer = knowing
    (row, *_) = probe_rows("copying", tokenizer, POSITIONS)
    place = row.places[0]
    with torch.no_grad():
        ids = torch.tensor([row.ids[: place.start]])
        written = model.generate(ids, do_sample=False, max_new_tokens=place.stop - place.start)
    assert written[0, place.start :].tolist() == row.ids[place.start : place.stop]
    assert run_probes(model, tokenizer)["copying"].score == 1.0


def test_a_collapse_that_perplexity_hides_is_named_with_both_scores(knowing):
    dense, tokenizer = knowing
    text = text_windows(tokenizer)
    broken = train(copy.deepcopy(dense), [], text, steps=60)
    ratio = perplexity(broken, text) / perplexity(dense, text)
    assert ratio < WELL, "perplexity sees nothing"
    before, after = run_probes(dense, tokenizer), run_probes(broken, tokenizer)
    warnings = compare_probes(before, after, perplexity_ratio=ratio)
    (text,) = [text for text in warnings if "copying" in text]
    assert f"fell from 1.00 to {after['copying'].score:.2f}" in text
    assert verdict("copying", before["copying"], after["copying"]) == "collapsed"
    assert compare_probes(before, before) == [], "the dense model has not collapsed"
    assert compare_probes(before, after, perplexity_ratio=2.0) == [], "perplexity says it itself"
    assert compare_probes(before, after, perplexity_ratio=float("nan")) == []


def test_a_probe_counts_only_where_the_dense_model_passes_half_of_it():
    bad, good, half = ProbeResult(0, 40), ProbeResult(40, 40), ProbeResult(19, 40)
    assert verdict("copying", good, bad) == "collapsed"
    assert verdict("copying", half, bad) == "not counted"
    assert compare_probes({"copying": half}, {"copying": bad}) == []


def test_a_drop_within_the_noise_of_few_questions_is_no_collapse():
    assert verdict("copying", ProbeResult(8, 12), ProbeResult(4, 12)) == "kept"
    assert verdict("copying", ProbeResult(80, 120), ProbeResult(40, 120)) == "collapsed"
    assert verdict("copying", ProbeResult(80, 120), ProbeResult(60, 120)) == "kept"


def test_guessing_scores_nothing():
    assert ProbeResult(20, 40, chance=0.5).score == 0.0
    assert ProbeResult(40, 40, chance=0.5).score == 1.0
    assert ProbeResult(10, 40, chance=0.5).score == 0.0


def test_what_a_tokenizer_cannot_express_is_said_and_not_judged():
    tokenizer = letters_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=POSITIONS)
    results = run_probes(model, tokenizer)
    assert results.keys() == PROBES.keys()
    for name in ("sums_2_digits", "brackets", "quotes", "counting"):
        assert results[name].score is None
        assert results[name].note == "the tokenizer does not express the questions"
        assert verdict(name, results[name], results[name]) == "not asked"


def test_a_short_context_is_said():
    tokenizer = TOKENIZERS["bpe"]
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=24)
    results = run_probes(model, tokenizer)
    assert (
        results["copying"].note == "the model reads 24 tokens, too few for examples and questions"
    )
    assert len(samples(model, tokenizer)[0].tokens) < NEW_TOKENS


def test_a_vocabulary_smaller_than_the_tokenizers_is_no_error():
    model = tiny_model(max_position_embeddings=POSITIONS)
    results = run_probes(model, TOKENIZERS["bpe"])
    assert all(result.score is None for result in results.values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "mamba", "rwkv", "gemma2", "mixtral"])
def test_probes_leave_a_model_as_it_was(family):
    tokenizer = TOKENIZERS["bpe"]
    model = tiny_model(family, vocab_size=len(tokenizer)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = run_probes(model, tokenizer), run_probes(model, tokenizer)
    assert first == second
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_samples_continue_greedily_and_end_where_the_text_ends(knowing):
    model, tokenizer = knowing
    found = samples(model, tokenizer)
    assert len(found) == len(PROMPTS)
    prompt = tokenizer(found[0].prompt, return_tensors="pt")["input_ids"]
    alone = model.generate(prompt, do_sample=False, max_new_tokens=NEW_TOKENS)
    assert alone[0, prompt.shape[1] :].tolist()[: len(found[0].tokens)] == [*found[0].tokens]
    ending = make_tokenizer(eos_token=".")  # which no prompt holds
    until = found[0].tokens.index(ending.eos_token_id)
    assert samples(model, ending)[0].tokens == found[0].tokens[:until]


def test_a_chat_model_answers_a_question_by_its_template(knowing):
    model, _ = knowing
    tokenizer = make_tokenizer(bos_token="<s>", chat_template=CHATML)
    found = samples(model, tokenizer)
    assert [sample.prompt for sample in found][-1] == QUESTION
    assert len(found) == len(PROMPTS) + 1
