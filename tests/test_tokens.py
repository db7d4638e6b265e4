"""What the model reads and what it learns, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers

import featherweight as fw
import tiny
from featherweight import InputError, Task, load_task
from featherweight.rows import Row
from featherweight.tokens import IGNORE, Example, Writer, writer_for
from tiny import BOS, EOS

TALK = (
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "what is two"},
    {"role": "assistant", "content": "the year"},
    {"role": "user", "content": "and three"},
    {"role": "assistant", "content": "a film"},
)


def decoder(max_length: int = 64, *, chat: bool = False, **more: Any) -> Writer:
    return Writer(tiny.tokenizer(bos=True, chat=chat), False, max_length, **more)


def encoder_decoder(max_length: int = 64) -> Writer:
    return Writer(tiny.tokenizer(eos=True), True, max_length)


def review(text: str, label: str = "very bad", tail: str = "\nLabel:") -> Row:
    return Row(((text, False), (tail, False), (label, True)), label, "a.csv:2", tiny.LABELS.index(label))


def request(prompt: str, response: str, messages: Any = None) -> Row:
    return Row(((prompt, False), (response, True)), response, "a.jsonl:1", messages=messages)


def learned(writer: Writer, example: Example) -> str:
    """The text of the trained tokens."""
    text: str = writer.tokenizer.decode([t for t in example.targets if t != IGNORE])
    return text


def test_a_row_is_specials_head_tail_answer_end() -> None:
    writer = decoder()
    example, cut = writer.example(review("what a film"))
    head, tail, answer = map(writer.plain, ("what a film", "\nLabel:", " very bad"))
    assert example.ids == [BOS, *head, *tail, *answer, EOS]
    assert example.targets == [IGNORE] * (1 + len(head) + len(tail)) + [*answer, EOS]
    assert example.prompt == [BOS, *head, *tail]
    assert not cut


def test_an_encoder_reads_the_text_and_a_decoder_writes_the_answer() -> None:
    writer = encoder_decoder()
    example, cut = writer.example(review("what a film"))
    assert example.ids == example.prompt == [*writer.plain("what a film"), *writer.plain("\nLabel:"), EOS]
    assert example.targets == [*writer.plain("very bad"), EOS]  # nothing stands before it: no space
    assert not cut


@pytest.mark.parametrize("make", [decoder, encoder_decoder])
def test_a_long_text_loses_its_end_and_keeps_template_and_label(make: Any) -> None:
    writer = make(20)
    examples, cut = writer.examples([review("film " * 50), review("a film"), review("cast " * 9 + "x")])
    assert cut == 1
    long = examples[0]
    assert len(long.ids) == 20
    text = writer.tokenizer.decode(long.prompt, skip_special_tokens=True)
    assert text.startswith("film film film")
    assert text.endswith("film\nLabel:")
    assert learned(writer, long).strip() == "very bad<eos>"
    assert all(len(e.ids) <= 20 for e in examples)


def test_a_text_is_cut_at_the_same_place_whatever_its_label() -> None:
    writer = decoder(20, label_room=3)
    prompts = [writer.prompt(review("film " * 50, label)) for label in tiny.LABELS]
    assert prompts[0] == prompts[1] == prompts[2]
    assert len(prompts[0]) == 20 - 3


@pytest.mark.parametrize("make", [decoder, encoder_decoder])
def test_a_template_that_leaves_no_room_for_the_text_is_refused(make: Any) -> None:
    with pytest.raises(InputError, match=r"a\.csv:2: template and label alone need more than max_length=8"):
        make(8).example(review("a film", tail="\nis this film a good or a bad film? answer:"))


def test_every_assistant_turn_is_learned_and_no_other() -> None:
    writer = decoder(chat=True)
    example, _ = writer.example(request("", "a film", TALK))
    assert learned(writer, example) == "the year<eos>a film<eos>"
    assert writer.tokenizer.decode(example.ids) == (
        "<|system|>\nbe kind<eos>\n<|user|>\nwhat is two<eos>\n<|assistant|>\nthe year<eos>\n"
        "<|user|>\nand three<eos>\n<|assistant|>\na film<eos>"
    )
    assert writer.tokenizer.decode(example.prompt).endswith("<|user|>\nand three<eos>\n<|assistant|>\n")
    assert len(example.targets) == len(example.ids)


def test_a_chat_template_that_rewrites_earlier_turns_has_the_last_answer_learned() -> None:
    writer = decoder(chat=True)
    writer.tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>\n"
        "{% if m['role'] == 'assistant' and not loop.last %}…{% else %}{{ m['content'] }}{% endif %}<eos>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    example, _ = writer.example(request("", "a film", TALK))
    assert learned(writer, example) == "a film<eos>"
    assert "<|assistant|>\n…<eos>" in writer.tokenizer.decode(example.ids)


def test_without_a_chat_template_the_prompt_is_plain_text() -> None:
    writer = decoder()
    example, _ = writer.example(request("what is two", "a film", TALK))
    assert example.prompt == [BOS, *writer.plain("what is two")]
    assert learned(writer, example) == " a film<eos>"


def test_an_encoder_decoder_has_no_use_for_a_chat_template() -> None:
    writer = Writer(tiny.tokenizer(eos=True, chat=True), True, 64)
    example, _ = writer.example(request("what is two", "a film", TALK))
    assert writer.tokenizer.decode(example.ids) == "what is two<eos>"
    assert learned(writer, example) == "a film<eos>"


def test_a_long_request_loses_its_beginning() -> None:
    writer = decoder(24)
    example, cut = writer.example(request("first " + "film " * 50 + "last", "a fine plot"))
    assert cut
    assert len(example.ids) == 24
    assert example.ids[0] == BOS
    assert "first" not in writer.tokenizer.decode(example.ids)
    assert writer.tokenizer.decode(example.prompt).endswith("film last")
    assert learned(writer, example) == " a fine plot<eos>"


def test_a_long_conversation_loses_its_first_turns_and_keeps_the_last_answer() -> None:
    writer = decoder(24, chat=True)
    example, cut = writer.example(request("", "a film", TALK))
    assert cut
    assert len(example.ids) == 24
    assert len(example.targets) == 24
    assert "be kind" not in writer.tokenizer.decode(example.ids)
    assert writer.tokenizer.decode(example.prompt).endswith("<|user|>\nand three<eos>\n<|assistant|>\n")
    assert learned(writer, example).endswith("a film<eos>")


@pytest.mark.parametrize("chat", [False, True])
def test_a_long_response_loses_its_end(chat: bool) -> None:
    writer = decoder(24, chat=chat)
    messages = ({"role": "user", "content": "say"}, {"role": "assistant", "content": "film " * 60})
    example, cut = writer.example(request("say", "film " * 60, messages))
    assert cut
    assert len(example.ids) == 24
    assert len(example.prompt) >= 1
    assert learned(writer, example).strip().startswith("film film film")
    assert EOS not in example.targets[-3:]


def test_an_encoder_decoders_long_response_loses_its_end_and_its_request_its_beginning() -> None:
    writer = encoder_decoder(24)
    example, cut = writer.example(request("first " + "film " * 60, "cast " * 60))
    assert cut
    assert (len(example.ids), len(example.targets)) == (24, 24)
    assert "first" not in writer.tokenizer.decode(example.ids)


def test_labels_are_their_own_tokens_only() -> None:
    writer = decoder()
    assert writer.label_ids(list(tiny.LABELS)) == [writer.plain(f" {label}") for label in tiny.LABELS]


def test_labels_that_merely_share_a_beginning_need_no_end() -> None:
    writer = decoder()
    ids = writer.label_ids(["very bad", "very fine"])
    assert ids[0][0] == ids[1][0]
    assert EOS not in ids[0] + ids[1]


def test_a_label_that_begins_another_gets_the_end_token_and_so_do_all() -> None:
    writer = decoder()
    ids = writer.label_ids(["very", "very bad", "fine"])
    assert [i[-1] for i in ids] == [EOS] * 3
    assert ids[1][: len(ids[0]) - 1] == ids[0][:-1]


def test_two_labels_with_the_same_tokens_are_refused() -> None:
    writer = decoder()
    writer.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(InputError, match="two labels have the same tokens in this model: Bad, bad, fine"):
        writer.label_ids(["Bad", "bad", "fine"])


def test_the_writer_of_a_base_keeps_within_its_context(llama: Path, t5: Path, tmp_path: Path) -> None:
    base = fw.load_base(str(llama), dtype="float32")
    assert writer_for(base, None).max_length == 128
    assert writer_for(base, 1000).max_length == 128
    assert writer_for(base, 50).max_length == 50
    assert writer_for(fw.load_base(str(t5), dtype="float32"), None).max_length == 1_000_000
    assert writer_for(base, None, methods=[fw.LoRA(), fw.PromptTuning(num_virtual_tokens=20)]).max_length == 108
    assert writer_for(base, 50, methods=[fw.PromptTuning(num_virtual_tokens=20)]).max_length == 50
    task = load_task(str(tiny.write(tmp_path / "a.csv", tiny.reviews())))
    assert writer_for(base, None, task.labels).label_room == 3


def test_every_row_of_a_task_fits(llama: Path, tmp_path: Path) -> None:
    rows = [{**r, "text": r["text"] * (1 + i)} for i, r in enumerate(tiny.reviews(40))]
    task: Task = load_task(str(tiny.write(tmp_path / "a.csv", rows)))
    writer = writer_for(fw.load_base(str(llama), dtype="float32"), 40, task.labels)
    examples, cut = writer.examples(task.train)
    assert max(len(e.ids) for e in examples) <= 40
    assert 0 < cut < len(examples)
    assert {learned(writer, e) for e in examples} == {f" {label}<eos>" for label in tiny.LABELS}
