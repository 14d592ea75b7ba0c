"""README.md of an exported model, as the hub reads it: metadata, then Markdown for people."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxreason.errors import UserError
from jaxreason.model import ModelConfig, family_of, param_count

_SECTIONS = (
    "title", "license", "language", "base_model", "start", "datasets", "stages", "recipe", "evaluation", "system_prompt",
)  # fmt: skip
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # OWNER/NAME, which the hub can link
_TASK = "text-generation"


def model_card(config: ModelConfig, dtype: str, card: Mapping[str, Any]) -> str:
    """A model card; what ``card`` lacks is left out or said to be unknown, never invented.

    Args:
      config: the exported architecture.  dtype: of the stored weights.
      card: ``title``, ``license`` (an id of the hub), ``language`` (codes), ``base_model`` (a hub id, which is linked), ``start``
        (words for other weights that training began with), ``datasets`` (hub ids, which are linked), ``stages`` (a sentence for
        each training), ``recipe`` (names and values of the last one), ``system_prompt`` (of training), and ``evaluation``:
        ``task``, ``max_completion_tokens``, and of what was measured ``accuracy``, ``before`` and ``change`` as (value, low,
        high), ``problems`` and ``loss`` (nats a token).

    Raises: UserError for an unknown section.
    """
    from huggingface_hub import ModelCard

    if unknown := sorted(set(card) - set(_SECTIONS)):
        raise UserError(f"model card section {unknown[0]!r} is unknown; known: {', '.join(_SECTIONS)}")
    title = _line(card.get("title", "Reasoning model"))
    base = _linked(card.get("base_model"))
    start = f"[{base}](https://huggingface.co/{base})" if base else _line(card.get("start") or "unknown weights")
    parts = [
        f"# {title}\n",
        f"A `{family_of(config).hf.architecture}` of {param_count(config):,} parameters that writes down its reasoning before it "
        f"answers. It was trained with jaxreason, starting from {start}.\n",
        _evaluation(card.get("evaluation") or {}),
        _usage(config, card),
        _section("Training", _training(card.get("stages") or (), card.get("recipe") or {})),
        _section("Model", _table(_architecture(config, dtype))),
        _section("Limits", "\n".join(f"- {limit}" for limit in _limits(card.get("evaluation") or {}))),
    ]
    front = _metadata(card, title)
    return str(ModelCard("---\n" + front.to_yaml() + "\n---\n\n" + "\n".join(parts)))


def _metadata(card: Mapping[str, Any], title: str) -> Any:
    """The front matter as huggingface_hub's ModelCardData."""
    from huggingface_hub import EvalResult, ModelCardData

    found, results = card.get("evaluation") or {}, []
    datasets = [name for name in card.get("datasets", ()) if _linked(name)]
    if "accuracy" in found:
        value, low, high = found["accuracy"]
        results = [EvalResult(
            task_type=_TASK, dataset_type=found["task"], dataset_name=found["task"], metric_type="accuracy",
            metric_value=round(value, 4), metric_name=f"greedy accuracy (95 % interval {low:.3f} to {high:.3f})",
        )]  # fmt: skip
    return ModelCardData(
        library_name="transformers", pipeline_tag=_TASK, tags=["jaxreason", "reasoning"], license=card.get("license"),
        language=card.get("language"), base_model=_linked(card.get("base_model")),
        datasets=datasets or None, model_name=title, eval_results=results or None,
    )  # fmt: skip


def _linked(name: str | None) -> str | None:
    """A hub id; None for what the hub would reject, such as the path of a directory."""
    return name if name and _HUB_ID.fullmatch(name) else None


# ---- sections


def _section(heading: str, text: str) -> str:
    return f"## {heading}\n\n{text}\n" if text else ""


def _evaluation(found: Mapping[str, Any]) -> str:
    """What was measured, with intervals, in sentences."""
    lines = []
    if "accuracy" in found:
        count, limit = found.get("problems"), found.get("max_completion_tokens")
        on = f"{count:,.0f} held-out problems" if count else "held-out problems"
        room = f", with at most {limit} tokens an answer" if limit else ""
        task = _code(found["task"])
        lines.append(f"**{_percent(found['accuracy'])}** of {on} of {task} are answered right by greedy decoding{room}.")
        if "before" in found:
            moved = f", which is a change of {_points(found['change'])}" if "change" in found else ""
            lines.append(f"Before the last stage of training it was {_percent(found['before'])}{moved}.")
        lines.append("Intervals are of 95 %, for other problems of the same kind; another seed of training may end elsewhere.")
    elif "loss" in found:
        lines.append("No problem with a known answer was graded, so how often this model is right is not known.")
    if "loss" in found:
        lines.append(f"The loss on held-out rows is {found['loss']:.4g} nats a token.")
    return _section("Evaluation", "\n".join(lines) or "This model was not evaluated: how often it is right is not known.")


def _percent(value: Sequence[float]) -> str:
    mean, low, high = (100 * each for each in value)
    return f"{mean:.1f} % ({low:.1f} to {high:.1f})"


def _points(value: Sequence[float]) -> str:
    mean, low, high = (100 * each for each in value)
    return f"{mean:+.1f} points ({low:+.1f} to {high:+.1f})"


def _usage(config: ModelConfig, card: Mapping[str, Any]) -> str:
    limit = (card.get("evaluation") or {}).get("max_completion_tokens") or min(1024, config.arch.max_positions // 2)
    system = card.get("system_prompt")
    first = [f'    {{"role": "system", "content": {_literal(system)}}},'] if system else []
    return "\n".join([
        "## Usage\n", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        'path = "."  # this directory, or the name of its repository',
        "tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)",
        "messages = [", *first,
        '    {"role": "user", "content": "Your question"},', "]",
        'prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)',
        f"answer = model.generate(**prompt, max_new_tokens={limit}, do_sample=False)",
        'print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1]:], skip_special_tokens=True))', "```", "",
    ])  # fmt: skip


def _literal(text: str) -> str:
    """A Python literal that ends neither its line nor the block of code that it is in."""
    return repr(text).replace("`", "\\x60")


def _training(stages: Sequence[str], recipe: Mapping[str, Any]) -> str:
    told = "\n".join(f"{number}. {_line(stage)}" for number, stage in enumerate(stages, 1))
    return "\n\n".join(filter(None, [told, _table(recipe)]))


def _limits(found: Mapping[str, Any]) -> list[str]:
    limits = ["An answer can be wrong however sure its reasoning sounds; check what matters."]
    if "accuracy" in found:
        limits.append(f"It was measured on {_code(found['task'])} alone: that says nothing of other tasks, languages or lengths.")
    return [
        *limits, "Reasoning that is written down is not always what decided the answer.",
        "Nothing here trained it to refuse or to be safe: what its starting weights and its data say, it may say.",
    ]  # fmt: skip


def _architecture(config: ModelConfig, dtype: str) -> dict[str, Any]:
    c, rope = config.arch, config.arch.rope_scaling
    return {
        "layers × width × mlp": f"{c.num_layers} × {c.embed_dim} × {c.mlp_dim}",
        "heads (key-value)": f"{c.num_heads} ({c.num_kv_heads}) of {c.head_dim}",
        "vocabulary": f"{c.vocab_size:,}, head {'tied' if c.tie_embeddings else 'untied'}",
        "rotary embedding": f"theta {c.rope_theta:g}" + (f", {rope.kind} factor {rope.factor:g}" if rope else ""),
        "positions": f"{c.max_positions:,}",
        "stop ids": ", ".join(map(str, c.stop_ids)) or None,
        "stored as": dtype,
    }


# ---- texts


def _table(values: Mapping[str, Any]) -> str:
    lines = [f"| {_line(key)} | {_cell(value)} |" for key, value in values.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *lines]) if lines else ""


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else _line(value)


def _code(value: str) -> str:
    return f"`{_line(value).replace('`', '')}`"


def _line(value: Any) -> str:
    """Text that can break neither out of its table cell nor into HTML: values come from data and command lines."""
    text = " ".join(str(value).split())
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
