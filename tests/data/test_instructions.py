"""Instructions: which template they get, and which tokens are learned."""

import pytest
from text_tokenizers import ALPACA, CHAT, CHATML, PAIR, make_tokenizer

from prunelight.data.instructions import instruction_example
from prunelight.data.token_windows import (
    tokenize,
)
from prunelight.losses import IGNORED_LABEL


def split_by_labels(tokenizer, row, seq_len=256):
    tokens, labels = instruction_example(row, tokenizer, seq_len=seq_len)
    assert len(tokens) == len(labels)
    prompt = [t for t, label in zip(tokens, labels, strict=True) if label == IGNORED_LABEL]
    response = [label for label in labels if label != IGNORED_LABEL]
    assert prompt + response == tokens  # the loss is on one stretch, at the end, on the tokens
    return tokenizer.decode(prompt), tokenizer.decode(response)


def test_without_a_chat_template_instructions_get_the_alpaca_template():
    prompt, response = split_by_labels(make_tokenizer(), ALPACA)
    assert prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd the numbers.\n\n### Input:\n1 and 2\n\n### Response:\n"
    )
    assert response == "The sum is 3.</s>"


@pytest.mark.parametrize("given", [{}, {"input": ""}, {"input": None}])
def test_the_alpaca_template_leaves_out_an_empty_input(given):
    row = {"instruction": "Count {x}.", "output": "One.", **given}
    prompt, _ = split_by_labels(make_tokenizer(), row)
    assert prompt.endswith("request.\n\n### Instruction:\nCount {x}.\n\n### Response:\n")
    assert "paired" not in prompt


def test_without_a_chat_template_other_rows_are_plain_text():
    assert split_by_labels(make_tokenizer(), PAIR) == ("The capital of France is", " Paris.</s>")
    prompt, response = split_by_labels(make_tokenizer(), CHAT)
    assert prompt == "Hello\n\nGood day.\n\nWho are you?\n\n"
    assert response == "A parrot.</s>"


@pytest.mark.parametrize("row", [ALPACA, PAIR, CHAT])
def test_with_a_chat_template_only_the_last_reply_is_learned(row):
    tokenizer = make_tokenizer(chat_template=CHATML)
    prompt, response = split_by_labels(tokenizer, row)
    assert prompt.startswith("<|im_start|>system\nBe kind.</s>\n<|im_start|>user\n")
    assert prompt.endswith("</s>\n<|im_start|>assistant\n")
    reply = {id(ALPACA): "The sum is 3.", id(PAIR): " Paris.", id(CHAT): "A parrot."}[id(row)]
    assert response == f"{reply}</s>\n"  # the template's eos, not a second one


def test_eos_is_added_where_the_template_gives_none():
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    _, response = split_by_labels(make_tokenizer(chat_template=template), CHAT)
    assert response == "A parrot.\n</s>"
    without_eos = make_tokenizer(eos_token=None, chat_template=template)
    assert split_by_labels(without_eos, CHAT)[1] == "A parrot.\n"


def test_a_template_that_rewrites_the_prompt_falls_back_to_prompt_and_reply():
    template = "{% for m in messages %}{{ m.role }}\n{{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}assistant\n<think>\n{% endif %}"
    prompt, response = split_by_labels(make_tokenizer(chat_template=template), CHAT)
    assert prompt.endswith("assistant\n<think>\n")
    assert response == "A parrot.</s>"


def test_a_joint_inside_a_token_keeps_the_tokens_of_the_prompt():
    tokenizer = make_tokenizer()
    row = {"prompt": "I like th", "response": "e sea"}
    assert len(tokenize(tokenizer, [" the"])[0]) == 1  # so that the joint is inside a token
    assert split_by_labels(tokenizer, row) == ("I like th", "e sea</s>")


def test_gemma_instructions_start_with_one_bos():
    tokenizer = make_tokenizer(bos_token="<bos>")
    plain, _ = instruction_example(PAIR, tokenizer, seq_len=64)
    tokenizer.chat_template = "<bos>" + CHATML
    chat, _ = instruction_example(PAIR, tokenizer, seq_len=64)
    for tokens in (plain, chat):
        assert tokens[0] == tokenizer.bos_token_id
        assert tokens.count(tokenizer.bos_token_id) == 1


def test_long_examples_are_cut_to_seq_len():
    tokenizer = make_tokenizer()
    whole, whole_labels = instruction_example(PAIR, tokenizer, seq_len=256)
    tokens, labels = instruction_example(PAIR, tokenizer, seq_len=len(whole) - 1)
    assert tokens == whole[:-1]
    assert labels == whole_labels[:-1]


@pytest.mark.parametrize(
    ("row", "seq_len"),
    [
        (PAIR, 4),
        ({"prompt": "Say nothing.", "response": " \n"}, 256),
        ({"instruction": "Say nothing.", "output": None}, 256),
        ({"messages": []}, 256),
        ({"messages": None}, 256),
        ({"messages": CHAT["messages"][:3]}, 256),
        ({"messages": CHAT["messages"][1:2]}, 256),
    ],
)
def test_rows_without_a_response_that_fits_give_none(row, seq_len):
    for template in (None, CHATML):
        tokenizer = make_tokenizer(chat_template=template)
        assert instruction_example(row, tokenizer, seq_len=seq_len) is None


def test_malformed_messages_are_named():
    row = {"messages": [{"role": "user", "content": None}, {"role": "assistant", "content": "Hi"}]}
    with pytest.raises(ValueError, match=r"message .*None.* must have strings as role and content"):
        instruction_example(row, make_tokenizer(), seq_len=64)


def test_a_chat_template_that_refuses_the_roles_is_named():
    tokenizer = make_tokenizer(chat_template="{{ raise_exception('no such role') }}")
    with pytest.raises(ValueError, match=r"refuses .*no such role.*; change the rows or set"):
        instruction_example(PAIR, tokenizer, seq_len=64)
