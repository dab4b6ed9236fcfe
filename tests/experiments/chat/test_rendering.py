"""What the assistant says, found in what chat templates make of it: held against the marks of templates that have some."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trl
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from pica.errors import DataError
from pica.experiments.chat.rendering import Renderer
from pica.experiments.chat.templates import named_templates
from pica.experiments.models import load_tokenizer
from pica.experiments.recipes.recipe import ModelSection
from pica.tasks.chat import Conversation

FOLDER = Path(trl.__file__).parent / "chat_templates"
MARKS = re.compile(
    r"<[|｜][^<>|｜ ]{1,40}[|｜]>|</?s>|<(?:start_of_turn|end_of_turn|turn\||\|turn)>|<end_of_utterance>"
)


def tokenizer_for(template: str) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(ModelSection(path="embedded"))
    if marks := sorted(set(MARKS.findall(template))):
        tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.chat_template = template
    return tokenizer


def said(*turns: str, system: str = "") -> Conversation:
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns)]
    return Conversation(
        (*([{"role": "system", "content": system}] if system else []), *messages), place="x.jsonl, line 1"
    )


TWO = said("Hi there", "Hello! How are you?", " And 2+2?\n", "It is 4.")
THOUGHT = Conversation(
    (
        {"role": "user", "content": "Think."},
        {"role": "assistant", "content": "Seven.", "reasoning_content": "let me see"},
        {"role": "user", "content": "More"},
        {"role": "assistant", "content": "Nine.", "reasoning_content": "hmm"},
    )
)
CALLED = Conversation(
    (
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "get", "arguments": {"city": "Rome"}}}],
        },
        {"role": "tool", "name": "get", "content": "sunny"},
        {"role": "assistant", "content": "Sunny."},
    ),
    tools=(
        {
            "type": "function",
            "function": {
                "name": "get",
                "description": "d",
                "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
            },
        },
    ),
    place="x.jsonl, line 1",
)


def found(template: str, conversation: Conversation, loss: str = "assistant") -> list[str]:
    rendered = Renderer(tokenizer_for(template), loss).render(conversation)  # pyright: ignore[reportArgumentType]
    return [rendered.text[begin:end] for begin, end in rendered.spans]


def of_trl(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


EXPECTED = {
    "llama3": ["Hello! How are you?<|eot_id|>", "It is 4.<|eot_id|>"],
    "llama3_2": ["Hello! How are you?<|eot_id|>", "It is 4.<|eot_id|>"],
    "qwen2_5": ["Hello! How are you?<|im_end|>", "It is 4.<|im_end|>"],
    "qwen3": ["Hello! How are you?<|im_end|>", "<think>\n\n</think>\n\nIt is 4.<|im_end|>"],
    "qwen3_instruct_2507": ["Hello! How are you?<|im_end|>", "It is 4.<|im_end|>"],
    "gemma3": ["Hello! How are you?<end_of_turn>", "It is 4.<end_of_turn>"],
    "gemma4": ["Hello! How are you?<turn|>", "It is 4.<turn|>"],
    "phi3": ["Hello! How are you?<|end|>", "It is 4.<|end|>"],
    "cohere": ["Hello! How are you?<|END_OF_TURN_TOKEN|>", "It is 4.<|END_OF_TURN_TOKEN|>"],
    "deepseekv3": ["Hello! How are you?<｜end▁of▁sentence｜>", "It is 4.<｜end▁of▁sentence｜>"],
    "deepseek_r1_distill": ["Hello! How are you?<｜end▁of▁sentence｜>", "It is 4.<｜end▁of▁sentence｜>"],
    "gptoss": [
        "<|channel|>final<|message|>Hello! How are you?<|end|>",
        "<|channel|>final<|message|>It is 4.<|return|>",
    ],
    "glm4moe": ["\n<think></think>\nHello! How are you?<|user|>", "\n<think></think>\nIt is 4.<|user|>"],
    "lfm2": ["Hello! How are you?<|im_end|>", "It is 4.<|im_end|>"],
    "smolvlm": [" Hello! How are you?<end_of_utterance>", " It is 4.<end_of_utterance>"],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_assistants_words_with_the_mark_that_ends_the_turn(name: str):
    assert found(of_trl(name), TWO) == EXPECTED[name]
    assert found(of_trl(name), TWO, "last") == EXPECTED[name][1:]


# Mistral's puts the system prompt before the last question, so that no beginning of a conversation is one of the next.
MISTRAL = """{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% set rest = messages[1:] %}
{%- else %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for m in rest %}
{%- if m['role'] == 'user' and loop.index0 >= rest|length - 2 and system is defined %}
{{- '[INST] ' + system + '\\n\\n' + m['content'] + '[/INST]' }}
{%- elif m['role'] == 'user' %}{{- '[INST] ' + m['content'] + '[/INST]' }}
{%- else %}{{- ' ' + m['content']|trim + eos_token }}{% endif %}{% endfor %}"""


def test_a_template_that_moves_the_system_prompt():
    conversation = said("Hi", "Hello.", "And?", " Good. ", system="Be kind.")
    assert found(MISTRAL, conversation) == ["Hello.</s>", "Good.</s>"]


def test_reasoning_is_learnt_where_the_template_keeps_it():
    assert found(of_trl("qwen3"), THOUGHT) == ["Seven.<|im_end|>", "<think>\nhmm\n</think>\n\nNine.<|im_end|>"]
    assert found(of_trl("gptoss"), THOUGHT)[1] == (
        "<|channel|>analysis<|message|>hmm<|end|><|start|>assistant<|channel|>final<|message|>Nine.<|return|>"
    )


def test_tool_calls_are_learnt_and_what_tools_say_is_not():
    call = '<tool_call>\n{"name": "get", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>'
    assert found(of_trl("qwen2_5"), CALLED) == [call, "Sunny.<|im_end|>"]
    for name in ("gemma4", "llama3_1", "deepseekv3", "glm4moe", "gptoss"):
        first, last = found(of_trl(name), CALLED)
        assert "get" in first
        assert "Rome" in first
        assert "sunny" not in first
        assert "Sunny." in last
    with pytest.raises(DataError, match="message 2 calls 'get', and the chat template leaves tool calls out"):
        found(of_trl("llama3"), CALLED)
    thinking = {**CALLED.messages[1], "content": "I must get it."}  # the name is there, the call is not
    with pytest.raises(DataError, match="message 2 calls 'get', and the chat template leaves tool calls out"):
        found(of_trl("llama3"), replace(CALLED, messages=(CALLED.messages[0], thinking, *CALLED.messages[2:])))


def test_tools_that_a_template_leaves_out_are_missed_once(caplog: pytest.LogCaptureFixture):
    asked = replace(CALLED, messages=(CALLED.messages[0], CALLED.messages[3]))
    for name, times in (("qwen2_5", 0), ("llama3", 1)):
        caplog.clear()
        renderer = Renderer(tokenizer_for(of_trl(name)))
        renderer.render(asked)
        renderer.render(asked)
        assert caplog.text.count("x.jsonl, line 1: the chat template leaves out which tools there are") == times


def test_learning_begins_with_the_completion_of_a_prompt():
    conversation = Conversation(TWO.messages, learnt_from=3)
    assert found(of_trl("qwen2_5"), conversation) == ["It is 4.<|im_end|>"]


@pytest.mark.parametrize(
    "name",
    sorted(p.stem for p in FOLDER.glob("*.jinja") if (FOLDER / f"{p.stem}_training.jinja").is_file()),
)
def test_equal_to_the_marks_of_trls_training_templates(name: str):
    """Wherever TRL's template with marks renders the same text, its marks are around the same tokens.

    TRL's may begin a turn later (after what the template adds to the words) or, for DeepSeek, with its header.
    """
    marked, plain = of_trl(f"{name}_training"), of_trl(name)
    tokenizer = tokenizer_for(plain)
    messages = [dict(message) for message in TWO.messages]
    if Renderer(tokenizer).stops and "content'][0]" in plain:
        pytest.skip("takes parts, which TRL's marks are not for")
    try:
        special: Any = {key: value for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
        made: Any = render_jinja_template(
            [messages], chat_template=marked, return_assistant_tokens_mask=True, **special
        )
        texts, marks = made
    except Exception as error:
        pytest.skip(f"TRL's template does not take this conversation: {error}")
    rendered = Renderer(tokenizer).render(TWO)
    if not rendered.text.startswith(texts[0].rstrip()):
        pytest.skip("TRL's training template renders another text")
    ours = [rendered.text[begin:end] for begin, end in rendered.spans]
    joined: list[list[int]] = []  # marks that follow each other, of words and of what ends the turn
    for begin, end in marks[0]:
        if joined and not texts[0][joined[-1][1] : begin].strip():
            joined[-1][1] = end
        else:
            joined.append([begin, end])
    theirs = [texts[0][begin:end].rstrip().removesuffix("</s>") for begin, end in joined]
    ours = [turn.removesuffix("</s>") for turn in ours]  # Phi's has one behind the mark that ends the turn
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs):
        shorter, longer = sorted((one, other), key=len)
        assert longer.endswith(shorter) or longer.startswith(
            shorter
        )  # they differ in the template's own additions only
        assert any(turn["content"].strip() in shorter for turn in messages)


@pytest.mark.parametrize("name", named_templates())
def test_the_packages_own_templates(name: str):
    text = named_templates()[name]
    first, last = found(text, said("Hi", "Hello.", "And?", "Good.", system="S"))
    assert first.startswith("Hello.")
    assert last.startswith("Good.")
    assert last.endswith(("</s>", "<|im_end|>"))


def test_tokens_are_those_of_the_whole_text_and_labels_those_of_the_words():
    tokenizer = tokenizer_for(of_trl("qwen2_5"))
    renderer = Renderer(tokenizer)
    ids, labels = renderer.tokens(TWO)
    text = renderer.render(TWO).text
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    learnt = [label for label in labels if label != -100]
    assert tokenizer.decode(learnt) == "".join(EXPECTED["qwen2_5"])
    # training sees the very tokens that generation starts from
    prompt = renderer.prompt(TWO.messages[:1])
    assert ids[: len(prompt)] == prompt
    assert labels[len(prompt)] == ids[len(prompt)]


def test_everything_and_plain_texts():
    tokenizer = tokenizer_for(of_trl("qwen2_5"))
    ids, labels = Renderer(tokenizer, "all").tokens(TWO)
    assert labels == [-100, *ids[1:]]  # nothing predicts the first one
    ids, labels = Renderer(tokenizer).tokens(Conversation(text="Tom has 3 apples."))
    assert ids[-1] == tokenizer.eos_token_id
    assert labels[1:] == ids[1:]


def test_what_is_too_long_is_cut_split_or_left_out_and_counted():
    tokenizer = tokenizer_for(of_trl("qwen2_5"))
    renderer = Renderer(tokenizer)
    short, long = said("Hi", "Yes."), said("Hi", "Yes. " * 40)
    length, limit = len(renderer.tokens(long)[0]), len(renderer.tokens(short)[0]) + 5
    assert length > 2 * limit
    cut = renderer.rows([short, long], max_length=limit, overflow="cut")
    assert (cut.cut, cut.split, cut.dropped) == (1, 0, 0)
    assert [len(row) for row in cut.input_ids] == [limit - 5, limit]
    split = renderer.rows([short, long], max_length=limit, overflow="split")
    assert split.split == 1
    assert sum(len(row) for row, owner in zip(split.input_ids, split.owners) if owner == 1) == length
    assert all(row[0] == -100 for row in split.labels)
    dropped = renderer.rows([short, long], max_length=limit, overflow="drop")
    assert dropped.dropped == 1
    assert dropped.owners == [0]
    with pytest.raises(DataError, match="None of the 1 conversations has anything to learn within"):
        renderer.rows([long], max_length=5)


def test_a_template_that_never_ends_a_turn_is_refused():
    template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    with pytest.raises(DataError, match="none of the tokenizer's marks after the assistant's words"):
        found(template, TWO)


def test_what_a_template_refuses_is_said_with_the_line():
    with pytest.raises(
        DataError, match="x.jsonl, line 1: the model's chat template refuses this conversation: System role"
    ):
        found(of_trl("gemma"), said("Hi", "Hello.", system="S"))
