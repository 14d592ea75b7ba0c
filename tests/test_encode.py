import json

import data_helpers as helpers
import numpy as np
import pytest

from jaxreason.data import chat as chats
from jaxreason.data import tokenizer as tokenizers
from jaxreason.data.chunks import Inline
from jaxreason.data.encode import Encoder, end_at_stop, fit
from jaxreason.data.example import Example, Reject
from jaxreason.errors import UserError


def encode(tokenizer, *examples, template=None):
    encoder = Encoder(tokenizer, chats.resolve(tokenizer, template), False)
    return encoder.chunk(Inline("here", 0, examples, len(examples)), "example")


def spans(encoded):
    """[(prompt ids, trained ids)] of each example."""
    rows = np.split(encoded.ids, np.cumsum(encoded.lengths)[:-1])
    return [(row[:start].tolist(), row[start:].tolist()) for row, start in zip(rows, encoded.starts)]


def test_trained_span_is_thought_answer_and_stop_token():
    tokenizer = helpers.llama()
    [(prompt, trained)] = spans(encode(tokenizer, Example("q", "a", "t")))
    assert tokenizer.decode(trained) == "<think>\nt\n</think>\n\na<|eot_id|>"
    assert trained[-1] == tokenizer.hf.convert_tokens_to_ids("<|eot_id|>")
    assert trained[-1] in tokenizer.stop_ids
    assert tokenizer.decode(prompt).endswith("assistant<|end_header_id|>\n\n")


def test_exactly_one_bos():
    tokenizer = helpers.llama()
    [(prompt, trained)] = spans(encode(tokenizer, Example("q", "a")))
    assert (prompt + trained).count(tokenizer.bos_id) == 1 and prompt[0] == tokenizer.bos_id


def test_prompt_ids_are_what_generation_starts_from():
    """This tokenizer splits a line break pair by what follows it, so the whole text has other prompt ids."""
    template = (
        "{% for m in messages %}{{ m['content'] + ('\n\n' if m['role'] == 'user' else eos_token) }}{% endfor %}"
    )
    tokenizer = helpers.chatml(template)
    example = Example("the user asks", "answer")
    [(prompt, trained)] = spans(encode(tokenizer, example))
    assert prompt == tokenizer.encode(chats.resolve(tokenizer).render_prompt(example))
    text = tokenizer.decode(prompt + trained)
    assert text == "the user asks\n\nanswer<|im_end|>"
    assert tokenizer.encode(text)[: len(prompt)] != prompt


def test_ids_equal_transformers_encoding_of_the_whole_conversation():
    tokenizer = helpers.llama(helpers.DATED_TEMPLATE)
    messages = [{"role": "user", "content": "the user asks"}, {"role": "assistant", "content": "the answer"}]
    twin = tokenizer.hf.apply_chat_template(messages, tokenize=True, return_dict=False, date_string="26 Jul 2024")
    [(prompt, trained)] = spans(encode(tokenizer, Example("the user asks", "the answer")))
    assert prompt + trained == twin


def test_pad_equal_to_eos_masks_nothing():
    tokenizer = helpers.llama(pad_token="<|end_of_text|>", chat_template=helpers.R1_TEMPLATE)
    assert tokenizer.pad_id == tokenizer.hf.eos_token_id
    [(_, trained)] = spans(encode(tokenizer, Example("q", "a", "t")))
    assert trained[-1] == tokenizer.hf.eos_token_id


def test_what_follows_the_stop_token_is_not_trained():
    tokenizer = helpers.chatml()
    [(_, trained)] = spans(encode(tokenizer, Example("q", "a"), template="chatml"))
    assert tokenizer.decode(trained) == "a<|im_end|>"  # the template writes a line break behind it


def test_a_control_token_inside_the_answer_is_rejected():
    encoded = encode(helpers.llama(), Example("q", "a"), Example("q", "a <|eot_id|> b"))
    assert encoded.rejects == [(1, "control token inside the answer", 1, "")]
    assert encoded.ordinals.tolist() == [0] and encoded.rows == 2


def test_a_template_without_stop_token_gets_the_eos():
    tokenizer = helpers.llama("{{ bos_token }}{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
    [(_, trained)] = spans(encode(tokenizer, Example("q", "a")))
    assert trained[-1] == tokenizer.hf.eos_token_id and tokenizer.decode(trained[:-1]) == "a\n"
    with pytest.raises(Reject):
        end_at_stop([tokenizer.hf.eos_token_id, *tokenizer.encode("b")], tokenizer)


def test_plain_text_is_trained_from_its_first_predictable_token():
    tokenizer = helpers.llama()
    [(prompt, trained)] = spans(encode(tokenizer, Example(None, "words")))
    assert prompt == [tokenizer.bos_id] and tokenizer.decode(trained) == "words<|end_of_text|>"
    without_bos = helpers.chatml()
    [(prompt, trained)] = spans(encode(without_bos, Example(None, "words"), template="chatml"))
    assert len(prompt) == 1 and without_bos.decode(prompt + trained) == "words<|im_end|>"


def test_a_question_without_answer_is_counted():
    assert encode(helpers.llama(), Example("q", gold="4")).rejects == [(0, "no answer to train on", 0, "")]


def test_sentencepiece_continuations_get_no_extra_space():
    """ "▁ab" begins a text, "ab" continues one: the pieces decode to the whole conversation."""
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token if m['role'] == 'assistant' else '\n' }}"
        "{% endfor %}"
    )
    tokenizer = helpers.sentencepiece_like(template)
    assert tokenizer.hf.convert_ids_to_tokens(tokenizer.encode("ab")) == ["▁ab"]
    [(prompt, trained)] = spans(encode(tokenizer, Example("ab", "ab")))
    assert tokenizer.hf.convert_ids_to_tokens(trained) == ["ab", "</s>"]
    assert tokenizer.hf.convert_ids_to_tokens(prompt)[-1] == "<0x0A>"


# --- over-length policy ----------------------------------------------------------------------------------------------

LENGTHS, STARTS = np.array([4, 9, 6, 12]), np.array([2, 3, 2, 8], np.int32)


def test_drop():
    kept = fit(LENGTHS, STARTS, 6, "drop", "f")
    assert kept.index.tolist() == [0, 2] and kept.lengths.tolist() == [4, 6]
    assert kept.truncated == 0 and kept.dropped == {"longer than max_length": 2}


def test_truncate_counts_rows_of_which_nothing_is_left_to_train():
    kept = fit(LENGTHS, STARTS, 6, "truncate", "f")
    assert kept.index.tolist() == [0, 1, 2] and kept.lengths.tolist() == [4, 6, 6]
    assert kept.truncated == 1 and list(kept.dropped.values()) == [1]


def test_error_names_the_example():
    with pytest.raises(UserError, match=r"f: 2 examples.*max_length=6, e\.g\. example 1 of 9 tokens"):
        fit(LENGTHS, STARTS, 6, "error", "f")
    assert fit(LENGTHS, STARTS, 12, "error", "f").dropped == {}


# --- tokenizer -------------------------------------------------------------------------------------------------------


def test_stop_ids_join_generation_config_eos_and_known_stops():
    names = ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
    tokenizer = helpers.llama()
    assert tokenizer.stop_ids == tuple(sorted(tokenizer.hf.convert_tokens_to_ids(names)))
    assert helpers.llama(generation_config={"eos_token_id": [300, 301]}).stop_ids == (*tokenizer.stop_ids, 300, 301)
    assert helpers.llama(generation_config={"eos_token_id": 300}).stop_ids == (*tokenizer.stop_ids, 300)


def test_load_reads_a_directory_and_its_generation_config(tmp_path):
    made = helpers.llama()
    made.save(tmp_path, chat_template=helpers.R1_TEMPLATE)
    (tmp_path / "SHA256SUMS").unlink()  # which would say that the next file was not saved with the others
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 299}))
    loaded = tokenizers.load(tmp_path)
    assert loaded.hf.chat_template == helpers.R1_TEMPLATE and made.hf.chat_template is None
    assert loaded.encode("the <|eot_id|> answer") == made.encode("the <|eot_id|> answer")
    assert 299 in loaded.stop_ids and loaded.vocab_size == made.vocab_size == len(made.hf)
    assert loaded.pad_id == loaded.hf.convert_tokens_to_ids("<|finetune_right_pad_id|>")
    assert loaded.fingerprint != made.fingerprint  # other stop ids end rows elsewhere


def test_what_is_saved_opens_in_other_versions(tmp_path):
    """transformers 4 and llama.cpp know the class by its old name alone, and how it was opened here is nobody's business."""
    made = helpers.llama()
    made.save(tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"backend", "is_local", "local_files_only", "name_or_path"} & set(saved)
    assert tokenizers.load(tmp_path).fingerprint == made.fingerprint


def test_further_special_tokens_are_saved_as_transformers_4_reads_them(tmp_path):
    """transformers 5 writes a list under extra_special_tokens, of which transformers 4 asks the keys."""
    made = helpers.llama()
    made.hf.add_special_tokens({"additional_special_tokens": ["<|one|>", "<|two|>"]})
    made.save(tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert saved["additional_special_tokens"] == ["<|one|>", "<|two|>"] and "extra_special_tokens" not in saved
    found = tokenizers.load(tmp_path)
    assert found.hf.special_tokens_map == made.hf.special_tokens_map and found.control == tokenizers.Tokenizer(made.hf).control
    assert found.fingerprint == tokenizers.Tokenizer(made.hf).fingerprint


def test_load_errors_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such directory"):
        tokenizers.load(tmp_path / "none")
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        tokenizers.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        tokenizers.load(tmp_path)
    monkeypatch.setattr("jaxreason.data.hub.offline", lambda: True)
    with pytest.raises(UserError, match=r"meta-llama/Llama-3\.2-3B.*cannot be reached.*hf auth login"):
        tokenizers.load("meta-llama/Llama-3.2-3B")


def test_limits_stored_in_tokenizer_json_are_ignored():
    made = helpers.llama()
    made.hf.backend_tokenizer.enable_truncation(3)
    made.hf.backend_tokenizer.enable_padding(length=9)
    assert len(tokenizers.Tokenizer(made.hf).encode("the user asks")) == len(helpers.llama().encode("the user asks"))
