import data_helpers as helpers
import pytest

from jaxreason.data import chat as chats
from jaxreason.data.example import Example, Reject
from jaxreason.errors import UserError

FULL = Example("2 + 2?", "four", "two and\n\ntwo", "be brief", None, (("user", "hi"), ("assistant", "ho")))
PLAIN = Example("2 + 2?", "four")
MESSAGES = {
    FULL: [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "<think>\ntwo and\n\ntwo\n</think>\n\nfour"},
    ],
    PLAIN: [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "four"}],
}
SHIPPED = {name: (chats.TEMPLATES / f"{name}.jinja").read_text() for name in chats.shipped()}


@pytest.mark.parametrize("example", [FULL, PLAIN], ids=["full", "plain"])
@pytest.mark.parametrize("template", [helpers.DATED_TEMPLATE, SHIPPED["llama3"], SHIPPED["chatml"]])
def test_equals_transformers(template, example):
    """Prompt, and prompt plus completion, are what ``apply_chat_template`` gives for the same conversation."""
    tokenizer = helpers.chatml(template) if "im_start" in template else helpers.llama(template)
    prompt, completion = chats.resolve(tokenizer).render(example)

    def twin(messages, **options):
        return tokenizer.hf.apply_chat_template(messages, tokenize=False, date_string="26 Jul 2024", **options)

    assert prompt == twin(MESSAGES[example][:-1], add_generation_prompt=True)
    assert prompt + completion == twin(MESSAGES[example])
    assert example.reply in completion


def test_shipped_llama3_by_hand():
    chat = chats.resolve(helpers.llama())
    assert chat.origin.endswith("llama3.jinja")
    prompt, completion = chat.render(Example("q", "a", "t"))
    head, foot = "<|start_header_id|>", "<|end_header_id|>\n\n"
    assert prompt == f"<|begin_of_text|>{head}user{foot}q<|eot_id|>{head}assistant{foot}"
    assert completion == "<think>\nt\n</think>\n\na<|eot_id|>"


def test_the_date_is_pinned():
    """Templates that ask the clock, or are given a date, render one text on any day."""
    clock = helpers.llama("{{ bos_token + strftime_now('%d %b %Y') + messages[0]['content'] }}")
    assert chats.resolve(clock).render_prompt(PLAIN) == "<|begin_of_text|>26 Jul 20242 + 2?"
    assert "Today Date: 26 Jul 2024" in chats.resolve(helpers.llama(helpers.DATED_TEMPLATE)).render_prompt(PLAIN)


def test_a_template_that_drops_the_thought_still_trains_all_of_it():
    """It opens the thought in the prompt, so the completion goes on from there and ends as the template ends."""
    prompt, completion = chats.resolve(helpers.llama(helpers.R1_TEMPLATE)).render(Example("q", "a", "t"))
    assert prompt == "<|begin_of_text|>[user]q<|eom_id|><think>\n"
    assert completion == "t\n</think>\n\na<|end_of_text|>"


def test_an_opened_thought_needs_a_thought():
    with pytest.raises(Reject, match="opens a thought"):
        chats.resolve(helpers.llama(helpers.R1_TEMPLATE)).render(PLAIN)


def test_r1_zero_template():
    prompt, completion = chats.resolve(helpers.llama(), "r1_zero").render(Example("q", "a", "t"))
    assert prompt.startswith("<|begin_of_text|>A conversation between User and Assistant. ")
    assert prompt.endswith("<answer> answer here </answer>. User: q Assistant: <think>\n")
    assert completion == "t\n</think>\n\na<|end_of_text|>"


def test_prompt_that_does_not_begin_the_conversation_is_an_error():
    template = (
        "{{ bos_token }}{% for m in messages %}{{ '(' + m['role'] + ')' + m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}(answer now){% endif %}"
    )
    with pytest.raises(UserError, match=r"chat template of tokenizer.*answer now.*data\.template.*llama3"):
        chats.resolve(helpers.llama(template)).render(PLAIN)


def test_system_prompt_fills_only_a_missing_system_message():
    chat = chats.resolve(helpers.llama(), system_prompt="think first")
    assert "think first" in chat.render_prompt(PLAIN)
    assert "think first" not in chat.render_prompt(FULL) and "be brief" in chat.render_prompt(FULL)


def test_template_file(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{{ bos_token }}{% for m in messages %}{{ m['content'] }}|{% endfor %}")
    assert chats.resolve(helpers.llama(), str(path)).render(PLAIN) == ("<|begin_of_text|>2 + 2?|", "four|")
    with pytest.raises(UserError, match=r"data\.template nope: no such file.*chatml, llama3"):
        chats.resolve(helpers.llama(), "nope")


def test_bos_exactly_once(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(UserError, match="writes no BOS"):
        chats.resolve(helpers.llama(), str(path))
    path.write_text("{{ bos_token + bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(UserError, match="two BOS"):
        chats.resolve(helpers.llama(), str(path))


def test_errors_of_templates_are_the_users(tmp_path):
    with pytest.raises(UserError, match=r"no system here; set data\.template"):
        chats.resolve(helpers.llama("{{ raise_exception('no system here') }}"))
    path = tmp_path / "broken.jinja"
    path.write_text("{% for %}")
    with pytest.raises(UserError, match=r"broken\.jinja"):
        chats.resolve(helpers.llama(), str(path))


def test_a_tokenizer_without_template_or_llama_tokens_needs_one():
    with pytest.raises(UserError, match=r"has no chat template; set data\.template"):
        chats.resolve(helpers.chatml())
    assert chats.resolve(helpers.chatml(), "chatml").render(PLAIN)[1] == "four<|im_end|>\n"


def test_generation_tag_renders_its_body():
    body = "{% generation %}{{ m['content'] }}{% endgeneration %};"
    template = "{{ bos_token }}{% for m in messages %}" + body + "{% endfor %}"
    assert chats.resolve(helpers.llama(template)).render(PLAIN) == ("<|begin_of_text|>2 + 2?;", "four;")
