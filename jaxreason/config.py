"""RunConfig: what a run is, as frozen pydantic models read from YAML and ``key=value`` words.

Nothing here touches a device or imports jax, so a wrong key is reported in a second.
"""

import contextlib
import difflib
import functools
import operator
import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from jaxreason.errors import UserError

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
DType = Literal["float32", "bfloat16"]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), populate_by_name=True, use_attribute_docstrings=True
    )


class Run(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    """The run's folder below ``dir``."""
    dir: str = "runs"
    """Where runs are written."""
    seed: NonNegative = 0
    """Seeds weights, data order and sampling."""


class Model(Section):
    preset: str | None = None
    """Architecture for random weights (``jaxreason.model.PRESETS``); with ``weights`` the checkpoint decides."""
    overrides: dict[str, Any] = {}
    """Fields of the preset's architecture to change, e.g. ``{num_layers: 2}``; only with ``preset``."""
    weights: str | None = None
    """Hugging Face directory, hub id, or a run; null: random weights of ``preset``."""
    tokenizer: str | None = None
    """Directory or hub id; null: the one beside the weights, or the embedded one for a preset without weights."""
    param_dtype: DType = "float32"
    """Master weights."""
    compute_dtype: DType = "bfloat16"
    """Matrix products; norms, softmax, logits and losses are float32 always."""
    attention: Literal["auto", "cudnn", "blockwise", "reference"] = "auto"
    """Attention backend; auto: cudnn on a Hopper GPU in bfloat16, else blockwise."""
    remat: Literal["none", "full", "attention", "matmuls"] = "none"
    """What the backward pass may reuse: everything, nothing, the attention outputs, or also the matmul outputs."""

    @model_validator(mode="after")
    def _one_source(self):
        if (self.preset is None) == (self.weights is None):
            raise ValueError("give exactly one of model.preset (random weights) and model.weights (a checkpoint)")
        if self.overrides and self.preset is None:
            raise ValueError("model.overrides changes a preset; with model.weights the checkpoint's config decides")
        return self


class Problems(Section):
    source: str
    """``embedded:NAME``, a .jsonl/.json/.parquet file, a directory of them, or a hub id."""
    split: str = "train"
    """Split of a hub data set; files have none."""
    row_schema: str = Field("auto", alias="schema")
    """Row format (``jaxreason.data.SCHEMAS``); auto: detected from the columns."""
    system_prompt: str | None = None
    """Put before every conversation that has no system message."""
    template: str | None = None
    """Chat template: a Jinja file, the name of a shipped one, or null for the tokenizer's own."""
    max_rows: Positive | None = None
    """Use only the first rows of the source."""
    eval_source: str | None = None
    """Held-out rows from another source."""
    eval_split: str | None = None
    """Split of ``eval_source``; null: ``eval`` of an embedded task, else ``split``."""


class Data(Problems):
    keep_only_correct: bool = False
    """Drop rows whose correctness columns say wrong; an error where the rows have none."""
    max_length: Positive = 1024
    """Tokens in a row."""
    over_length: Literal["drop", "truncate", "error"] = "drop"
    """What happens to a longer example."""
    packing: bool = True
    """Put several examples in one row, isolated by segment ids."""
    shuffle: bool = True
    """A new order each epoch, from the seed; false: file order."""
    batch_size: Positive = 32
    """Sequences, or packed rows, in one optimizer step."""
    eval_rows: NonNegative = 0
    """Held-out examples for the loss: of ``eval_source``, or chosen from this source by seed; 0: none."""
    workers: NonNegative = 2
    """Processes that tokenize; 0: in this one."""
    cache_dir: str | None = None
    """Tokenized data; null: ``~/.cache/jaxreason`` (or ``$JAXREASON_CACHE``)."""


class Loss(Section):
    name: str
    """A named loss, or ``package.module:function``."""
    options: dict[str, Any] = {}
    """Arguments of the loss; its docstring lists them."""


class SftLoss(Loss):
    name: str = "nll"
    """A named loss, or ``package.module:function``."""


class Optimizer(Section):
    learning_rate: float = Field(1e-5, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """Shape after the warm-up."""
    warmup_steps: NonNegative = 0
    """Optimizer steps of linear warm-up, or give ``warmup_fraction``."""
    warmup_fraction: Fraction = 0.0
    """Warm-up as a fraction of all steps, or give ``warmup_steps``."""
    final_fraction: Fraction = 0.0
    """The schedule ends at this fraction of the learning rate."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled decay, per unit of learning rate; norms and biases are exempt."""
    b1: float = Field(0.9, ge=0, lt=1)
    b2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Global-norm clip; null: none."""
    moment_dtype: DType = "float32"
    """Storage of both Adam moments; their arithmetic is float32."""

    @model_validator(mode="after")
    def _one_warmup(self):
        if self.warmup_steps and self.warmup_fraction:
            raise ValueError("give only one of optimizer.warmup_steps and optimizer.warmup_fraction")
        return self


class Train(Section):
    steps: Positive | None = None
    """Optimizer steps, or give ``epochs``."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the data, or give ``steps``."""
    microbatch_size: Positive | None = None
    """Rows in one forward and backward pass over all devices; null: the whole batch."""
    save_every: NonNegative = 0
    """Steps between checkpoints; 0: only the last step."""
    keep_checkpoints: Positive = 2
    """Older checkpoints are deleted."""
    eval_every: NonNegative = 0
    """Steps between evaluations; 0: only at the end."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs the package tensorboardX)."""
    wandb: str | None = None
    """Also log to this Weights & Biases project (needs the package wandb)."""

    @model_validator(mode="after")
    def _one_length(self):
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of train.steps and train.epochs")
        return self


class Eval(Section):
    problems: NonNegative = 0
    """Held-out problems answered greedily and graded; 0: none."""
    max_completion_tokens: Positive = 256
    slots: Positive = 64
    """Sequences decoded at once."""


class Mesh(Section):
    data: int = 1
    """Replicas of the parameters."""
    fsdp: int = -1
    """Shards of parameters, optimizer and batch; -1: all remaining devices."""
    tensor: int = 1
    """Shards of heads and mlp."""

    @model_validator(mode="after")
    def _sizes(self):
        sizes = [self.data, self.fsdp, self.tensor]
        if any(size < -1 or size == 0 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError("mesh axes are positive, and at most one of them is -1 (all remaining devices)")
        return self


class Decode(Section):
    """Words of generate.py and evaluate.py."""

    temperature: float = Field(0.0, ge=0)
    """0: greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: NonNegative = 0
    """0: all."""
    min_p: Fraction = 0.0
    max_completion_tokens: Positive = 1024
    slots: Positive = 32
    """Sequences decoded at once."""
    seed: NonNegative = 0
    system_prompt: str | None = None
    template: str | None = None
    """Chat template: a Jinja file, or null for the tokenizer's own."""
    compute_dtype: DType = "float32"
    attention: Literal["auto", "cudnn", "blockwise", "reference"] = "auto"


class Task(Decode):
    """Words of evaluate.py."""

    split: str = "test"
    """Split of a hub data set."""
    problems: Positive = 500
    """At most so many problems, the first ones."""


class GrpoData(Problems):
    max_prompt_tokens: Positive = 512
    """Problems with a longer prompt are dropped and counted."""
    shuffle: bool = True
    """A new order each epoch, from the seed; false: source order."""


class GrpoLoss(Loss):
    name: str = "grpo"
    """A named policy loss, or ``package.module:function``."""
    preset: Literal["trl", "verl", "nemo"] | None = None
    """Conventions of another framework where they differ; ``options`` win over it."""


class Rollout(Section):
    prompts_per_step: Positive = 16
    group_size: Positive = 8
    """Completions of each prompt (G)."""
    max_completion_tokens: Positive = 1024
    temperature: float = Field(1.0, gt=0)
    """Log-probs are of the distribution at this temperature, in the sampler and in the learner."""
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: NonNegative = 0
    """0: all."""
    min_p: Fraction = 0.0
    slots: Positive = 64
    """Sequences decoded at once."""
    resample_rounds: NonNegative = 0
    """DAPO's dynamic sampling: replace groups whose rewards are all equal by new prompts, at most this often a step."""


class RewardTerm(Section):
    name: str
    """A named reward, or ``package.module:function``."""
    weight: float = 1.0
    options: dict[str, Any] = {}


class Reward(Section):
    functions: list[RewardTerm] = [RewardTerm(name="accuracy")]
    """The reward is the weighted sum."""
    workers: NonNegative = 2
    """Grading processes; 0: in this one, without a time limit."""
    timeout_s: float = Field(10.0, gt=0)
    """A grader that takes longer is killed; its sample gets no reward and is counted."""
    on_error: Literal["count", "stop"] = "count"


class Advantage(Section):
    name: str | None = None
    """An estimator of ``jaxreason.losses.advantage``; null: the one that belongs to the loss."""
    options: dict[str, Any] = {}


class Kl(Section):
    coef: float = Field(0.0, ge=0)
    """0: no reference model is kept."""
    estimator: Literal["k1", "k2", "k3", "k3+", "k3_unbiased"] = "k3"
    placement: Literal["loss", "reward"] = "loss"
    """In the loss by token, or subtracted from the sequence's reward (k1, summed over its tokens)."""


class GrpoTrain(Train):
    updates_per_rollout: Positive = 1
    """Optimizer updates made from one rollout."""
    minibatches: Positive = 1
    """Parts that a rollout is split into; update u trains part u mod minibatches."""
    truncated: Literal["train", "mask"] = "train"
    """What a completion that ran into max_completion_tokens teaches: its reward, or nothing."""

    @model_validator(mode="after")
    def _whole_passes(self):
        if self.updates_per_rollout % self.minibatches:
            raise ValueError(
                f"train.updates_per_rollout {self.updates_per_rollout} is not a multiple of "
                f"train.minibatches {self.minibatches}"
            )
        return self


class GrpoEval(Eval):
    samples: Positive = 1
    """Completions a problem beside the greedy one, for avg@k; 1: greedy only."""
    temperature: float = Field(0.6, gt=0)
    """Of those samples."""


class SftConfig(Section):
    algorithm: Literal["sft"]
    run: Run
    model: Model
    data: Data
    loss: SftLoss = SftLoss()
    optimizer: Optimizer = Optimizer()
    train: Train
    eval: Eval = Eval()
    mesh: Mesh = Mesh()


class GrpoConfig(Section):
    algorithm: Literal["grpo"]
    run: Run
    model: Model
    data: GrpoData
    rollout: Rollout = Rollout()
    reward: Reward = Reward()
    advantage: Advantage = Advantage()
    loss: GrpoLoss = GrpoLoss()
    kl: Kl = Kl()
    optimizer: Optimizer = Optimizer()
    train: GrpoTrain
    eval: GrpoEval = GrpoEval()
    mesh: Mesh = Mesh()

    @model_validator(mode="after")
    def _splits(self):
        sequences = self.rollout.prompts_per_step * self.rollout.group_size
        if sequences % self.train.minibatches:
            raise ValueError(
                f"train.minibatches {self.train.minibatches} does not divide the {sequences} sequences of a rollout "
                "(rollout.prompts_per_step x rollout.group_size)"
            )
        return self


RunConfig = SftConfig | GrpoConfig
ALGORITHMS: dict[str, type[Section]] = {"sft": SftConfig, "grpo": GrpoConfig}

# Keys that a resumed run may change: they move where and how fast it runs, not what it computes.
RESUMABLE = frozenset(
    {"run.dir", "data.workers", "data.cache_dir", "reward.workers", "train.save_every", "train.keep_checkpoints", "train.tensorboard",
     "train.wandb", "mesh.data", "mesh.fsdp", "mesh.tensor"}
)  # fmt: skip


def find(name: str) -> Path:
    """The YAML file that ``--config NAME|PATH`` means. Raises UserError with the known names."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if path.is_file():
            return path
        raise UserError(f"--config {name}: no such file")
    here = Path(__file__).resolve().parent
    roots = [Path.cwd() / "configs", here.parent / "configs", here / "configs"]
    for root in roots:
        if (root / f"{name}.yaml").is_file():
            return root / f"{name}.yaml"
    known = sorted({str(p.relative_to(r).with_suffix("")) for r in roots if r.is_dir() for p in r.rglob("*.yaml")})
    raise UserError(f"--config {name}: no such config{_nearest(name, known)}; known: {', '.join(known)}")


def load(name: str, overrides: typing.Sequence[str] = ()) -> RunConfig:
    """Reads config ``name``, applies ``key=value`` words, validates. Raises UserError."""
    path = find(name)
    return build(_read_yaml(path.read_text(), str(path)), overrides, str(path))


def build(values: dict, overrides: typing.Sequence[str] = (), where: str = "config") -> RunConfig:
    """A validated config from plain values and ``key=value`` words; ``where`` names the file in messages."""
    values = _copy(values)
    words = {}
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not key:
            raise UserError(f"{word!r} is not of the form key=value, e.g. optimizer.learning_rate=1e-4")
        words[key] = word
        _assign(values, key, _read_yaml(text, word), word)
    algorithm = values.get("algorithm")
    if algorithm not in ALGORITHMS:
        raise UserError(f"{where}: algorithm is {algorithm!r}; it is one of {', '.join(ALGORITHMS)}")
    config_class = ALGORITHMS[algorithm]
    try:
        return config_class.model_validate(_numbers(values, config_class, ""))
    except pydantic.ValidationError as error:
        raise UserError(_explain(error, config_class, where, words)) from None


def parse_words(section: type[Section], words: typing.Sequence[str]) -> Section:
    """A section from ``key=value`` words alone. Raises UserError."""
    values = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"{word!r} is not of the form key=value, e.g. temperature=0.6")
        _assign(values, key, _read_yaml(text, word), word)
    try:
        return section.model_validate(_numbers(values, section, ""))
    except pydantic.ValidationError as error:
        raise UserError(_explain(error, section, "command line", {})) from None


def dump(config: RunConfig) -> str:
    """The resolved config as YAML, every key present."""
    return yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)


def differences(old: dict, new: dict, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Keys (dotted) whose values differ between two dumped configs, with both values."""
    found = {}
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found |= differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found[prefix + key] = (a, b)
    return found


def json_schema() -> dict:
    """JSON Schema of the config files, for editors."""
    return pydantic.TypeAdapter(functools.reduce(operator.or_, ALGORITHMS.values())).json_schema(by_alias=True)


def _read_yaml(text: str, where: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}: not valid YAML: {getattr(error, 'problem', error)}") from None
    return value


def _copy(values: Any) -> Any:
    return {key: _copy(value) for key, value in values.items()} if isinstance(values, dict) else values


def _assign(values: dict, key: str, value: Any, word: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        inner = values.get(parent)
        if inner is None:
            inner = values[parent] = {}
        if not isinstance(inner, dict):
            raise UserError(f"{word}: {parent} is a value, not a section")
        values = inner
    values[last] = value


def _section(annotation: Any) -> type[BaseModel] | None:
    """The Section in an annotation, looking through Optional and Annotated."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for inner in typing.get_args(annotation):
        if found := _section(inner):
            return found
    return None


def _wants_float(annotation: Any) -> bool:
    if annotation is float:
        return True
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, Annotated):
        return any(_wants_float(inner) for inner in typing.get_args(annotation))
    return False


def _numbers(values: Any, section: type[BaseModel], prefix: str) -> Any:
    """YAML 1.1 reads ``3e-4`` as a string; where the schema wants a float, make it one."""
    if not isinstance(values, dict):
        return values
    fields = {field.alias or name: field for name, field in section.model_fields.items()}
    done = {}
    for key, value in values.items():
        field = fields.get(key)
        if field is not None and isinstance(value, str) and _wants_float(field.annotation):
            try:
                value = float(value)
            except ValueError:
                raise UserError(f"{prefix}{key} is {value!r}, which is not a number") from None
        elif field is not None and (inner := _section(field.annotation)) and isinstance(value, dict):
            value = _numbers(value, inner, f"{prefix}{key}.")
        elif isinstance(value, dict):
            value = _loose_numbers(value)
        done[key] = value
    return done


def _loose_numbers(values: dict) -> dict:
    """The same for free-form options, where no schema says what is a number."""
    done = {}
    for key, value in values.items():
        if isinstance(value, dict):
            value = _loose_numbers(value)
        elif isinstance(value, str) and value[:1] in "+-.0123456789" and value[:1]:
            with contextlib.suppress(ValueError):
                value = float(value)
        done[key] = value
    return done


def keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key below ``section``."""
    found = []
    for name, field in section.model_fields.items():
        key = prefix + (field.alias or name)
        inner = _section(field.annotation)
        found += keys(inner, key + ".") if inner else [key]
    return found


def _nearest(name: str, known: typing.Iterable[str]) -> str:
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""


def _explain(error: pydantic.ValidationError, config_class: type[BaseModel], where: str, words: dict) -> str:
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        place = f"{words[key]} (command line)" if key in words else f"{where}{_line(where, item['loc'])}"
        if item["type"] == "extra_forbidden":
            known = keys(config_class)
            sections = sorted({k.split(".")[0] for k in known})
            if (owner := [name for name, other in ALGORITHMS.items() if other is not config_class
                          and any(k == key or k.startswith(key + ".") for k in keys(other))]):  # fmt: skip
                lines.append(f"{place}: {key} is a key of algorithm {owner[0]}, not of this config's")
            else:
                pool = known if "." in key else known + sections
                lines.append(f"{place}: unknown key {key}{_nearest(key, pool)}")
        elif item["type"] == "missing":
            lines.append(f"{place}: {key} is missing")
        elif item["type"] == "value_error":
            lines.append(f"{place}: {item['ctx']['error']}")
        else:
            lines.append(f"{place}: {key} is {item['input']!r}: {item['msg']}")
    return "\n".join(lines)


def _line(where: str, loc: tuple) -> str:
    """``, line N`` of a key in a YAML file, if it stands there."""
    path = Path(where)
    if not path.is_file():
        return ""
    node, line = yaml.compose(path.read_text()), None
    for part in loc:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        match = [(k, v) for k, v in pairs if k.value == str(part)]
        if not match:
            break
        line, node = match[0][0].start_mark.line + 1, match[0][1]
    return f", line {line}" if line else ""


if __name__ == "__main__":
    import json

    print(json.dumps(json_schema(), indent=1))
