"""The sections of a run's config, as frozen pydantic models. A key's docstring is its documentation everywhere."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

_MOST = 2**31 - 1  # of anything that is counted: more is a slip of the hand
Positive = Annotated[int, Field(ge=1, le=_MOST)]
NonNegative = Annotated[int, Field(ge=0, le=_MOST)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # the range of a key of jax.random, 0 to 4294967295
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
DType = Literal["float32", "bfloat16"]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), populate_by_name=True, use_attribute_docstrings=True,
        allow_inf_nan=False,
    )


class Run(Section):
    name: str = Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")
    """The run's folder below ``dir``."""
    dir: str = "runs"
    """Where runs are written."""
    seed: Seed = 0
    """Seeds weights, data order and sampling."""
    deterministic: bool = False
    """The same bits from the same inputs on the same GPUs, at some cost in speed; a CPU always gives them."""


class Resolved(Section):
    """What the names in a config meant when its run started. A run writes it into its config.yaml and resumes with it."""

    weights: str | None = None
    """The checkpoint or directory that ``model.weights`` meant; a reference is made of it."""
    weights_digest: str | None = None
    """Tells those weights from others."""
    teacher: str | None = None
    """The checkpoint or directory that ``teacher.weights`` meant."""
    teacher_digest: str | None = None
    """Tells those weights from others."""
    data: str | None = None
    """Fingerprint of the training data, of the tokenizer and of the template."""


class Model(Section):
    preset: str | None = None
    """Architecture for random weights (``jaxreason.model.PRESETS``); with ``weights`` the checkpoint decides."""
    overrides: dict[str, Any] = {}
    """Fields of the preset's architecture to change, e.g. ``{num_layers: 2}``; only with ``preset``."""
    weights: str | None = None
    """Hugging Face directory, hub id, or a run; null: random weights of ``preset``."""
    tokenizer: str | None = None
    """Directory or hub id; null: the one that belongs to the weights, or the embedded one for a preset without weights."""
    param_dtype: DType = "float32"
    """Weights that are trained; updates of bfloat16 ones are computed in float32 and rounded stochastically."""
    compute_dtype: DType = "bfloat16"
    """Matrix products; norms, softmax, logits and losses are float32 always."""
    attention: Literal["auto", "cudnn", "blockwise", "reference"] = "auto"
    """Attention backend; auto: cudnn on a Hopper GPU in bfloat16, else blockwise."""
    remat: Literal["none", "full", "attention", "matmuls"] = "matmuls"
    """What the backward pass may reuse: everything, nothing, the attention outputs, or also the matmul outputs.
    ``matmuls`` computes no product twice and is the fastest on a CPU, which writes fewer residuals."""
    scan_layers: bool = True
    """Whether training loops over layers; false writes every layer out, which saves the copies of what a loop keeps from
    one layer to the next: 9 % of a 3B step on an H100, for twice the compiling (23 s)."""

    @model_validator(mode="after")
    def _one_source(self):
        if (self.preset is None) == (self.weights is None):
            raise ValueError("give exactly one of model.preset (random weights) and model.weights (a checkpoint)")
        if self.overrides and self.preset is None:
            raise ValueError("model.overrides changes a preset; with model.weights the checkpoint's config decides")
        return self


Target = Literal["q", "k", "v", "o", "gate", "up", "down", "embedding", "head"]


class Lora(Section):
    """Low-rank adapters (arXiv 2106.09685): they train, and the weights stay what they were."""

    rank: Positive | None = None
    """r of the adapters; null: none, the weights themselves train."""
    alpha: float = Field(32.0, gt=0)
    """The adapters' product is multiplied by alpha / r."""
    scaling: Literal["rank", "sqrt_rank"] = "rank"
    """sqrt_rank: by alpha / sqrt(r) (rsLoRA, arXiv 2312.03732), under which a large rank learns as fast as a small one."""
    targets: list[Target] = Field(["q", "k", "v", "o", "gate", "up", "down"], min_length=1)
    """Matrices that have an adapter; ``embedding`` of a model with tied tables is its head as well."""
    init: Literal["kaiming", "pissa"] = "kaiming"
    """How adapters begin. kaiming: A is drawn and B zero, so that the run begins with the model as it is, bit for bit; pissa
    (arXiv 2404.02948): the largest singular triplets of each matrix, which the frozen base then lacks, train."""
    kind: Literal["lora", "dora"] = "lora"
    """dora (arXiv 2402.09353) also trains the norm of every output's weights, which costs a pass over the weights a layer."""
    base: Literal["param", "int8", "nf4"] = "param"
    """What the frozen matrices of the layers are kept as: in model.param_dtype, in int8 (8.5 bits a weight) or in NF4 (QLoRA,
    arXiv 2305.14314; 4.13 bits), from which each layer is made anew wherever it is used."""
    learning_rate_ratio: float = Field(1.0, gt=0)
    """Learning rate of B over that of A (LoRA+, arXiv 2402.12354, which uses 16)."""
    weights: str | None = None
    """PEFT adapter to start from: a directory with adapter_config.json, whose rank, scale and targets are those given here;
    null: as ``init`` says."""

    @model_validator(mode="after")
    def _of_adapters(self):
        if self.rank is None and (given := self.model_fields_set - {"rank"}):
            changed = [name for name in sorted(given) if getattr(self, name) != type(self).model_fields[name].default]
            if changed:
                raise ValueError(f"lora.{changed[0]} is of adapters, and there are none: set lora.rank, e.g. 16")
        if len(set(self.targets)) < len(self.targets):
            raise ValueError(f"lora.targets names one twice: {', '.join(self.targets)}")
        tables = [name for name in self.targets if name in ("embedding", "head")]
        if tables and self.kind == "dora":
            raise ValueError(f"lora.kind dora is of layers' matrices: leave {', '.join(tables)} out of lora.targets")
        if self.init == "pissa":
            refused = {
                "lora.kind": (self.kind == "dora", "its adapters do not begin at the model's own norms; use lora"),
                "lora.weights": (self.weights is not None, "adapters that are given are how they begin; leave it null"),
                "lora.targets": (bool(tables), f"it takes apart matrices of layers only; leave out {', '.join(tables)}"),
            }
            for key, (there, fix) in refused.items():
                if there:
                    raise ValueError(f"{key} does not combine with lora.init=pissa: {fix}")
        return self


class Portion(Section):
    """A further source of ``data.mixture``."""

    source: str
    """What ``data.source`` takes."""
    split: str | None = "train"
    """Split of a hub data set, or of a directory whose files are named after splits; null: files that no split is named for."""
    row_schema: str = Field("auto", alias="schema")
    """Row format; auto: detected from the columns."""
    max_rows: Positive | None = None
    """Use only the first rows of the source."""
    weight: float = Field(1.0, gt=0)
    """Passes over this source in one over ``data.source``: 2: each row twice; 0.25: a quarter of the rows, another each epoch."""


class Problems(Section):
    source: str
    """``embedded:NAME``, ``reasoning-gym:NAME``, a file (.jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow; text also
    packed as .gz or .zst), a directory of them, a pattern such as ``data/*.jsonl``, each also as an address (``s3://``, ``gs://``,
    ``hf://``, ``https://``), or a hub id."""
    split: str = "train"
    """Split of a hub data set, or of a directory whose files are named after splits; a file has none."""
    row_schema: str = Field("auto", alias="schema")
    """Row format (``jaxreason.data.SCHEMAS``); auto: detected from the columns."""
    system_prompt: str | None = None
    """Put before every conversation that has no system message."""
    template: str | None = None
    """Chat template: a Jinja file, the name of a shipped one, or null for the tokenizer's own."""
    trust_special_tokens: bool = False
    """Whether a control token that a row's text spells out (``<|eot_id|>``) is that token. False: it is the characters that it
    is in what a user, a system message or an earlier turn says, and a row whose answer holds one is dropped and counted."""
    max_rows: Positive | None = None
    """Use only the first rows of the source."""
    streaming: bool = False
    """Read the source in passes and keep none of it on the disk: SFT tokenizes it as it comes (``stream_rows``), GRPO holds its
    prompts in memory, as always; a hub data set is not downloaded."""
    mixture: list[Portion] = []
    """Further sources, ``[{source: b.jsonl, weight: 0.5}]``: an epoch is one pass over ``source`` and ``weight`` over each."""
    keep_columns: list[str] = []
    """Columns of a row that your reward function reads as ``sample.row[name]``."""
    eval_source: str | None = None
    """Held-out rows from another source."""
    eval_split: str | None = None
    """Split of ``eval_source`` (or of ``source``); null: ``eval`` of a task that a program writes, and the first of
    ``test``, ``validation`` and ``eval`` of a source whose splits have names."""


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
    think_weight: float = Field(1.0, ge=0)
    """Weight of the targets up to ``</think>`` in the loss; the denominator stays the token count."""
    answer_weight: float = Field(1.0, ge=0)
    """Weight of the targets after ``</think>``, or of all where an answer has no thought."""
    stream_rows: Positive = 8192
    """With ``streaming``: examples that are shuffled and packed together. At most twice as many are in memory."""
    eval_rows: NonNegative = 0
    """Held-out examples for the loss: of ``eval_source``, or chosen from this source by seed (of a stream the first); 0: none."""
    workers: NonNegative = 2
    """Processes that tokenize; 0: in this one."""
    cache_dir: str | None = None
    """Tokenized data; null: ``~/.cache/jaxreason`` (or ``$JAXREASON_CACHE``)."""

    @model_validator(mode="after")
    def _stream(self):
        if self.streaming and self.mixture:
            raise ValueError(
                "data.streaming does not go with data.mixture: its weights are in passes, and how long a pass over a stream is "
                "nobody knows before its end; put the files into one directory, or leave data.streaming false"
            )
        if self.streaming and self.max_rows is not None:
            raise ValueError(
                "data.streaming does not go with data.max_rows, since each pass reads the shards in another order: set "
                "data.max_rows=null; train.steps says how much is read"
            )
        return self


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
    """Decoupled decay, multiplied by the learning rate; of all matrices, not of norms and biases."""
    b1: float = Field(0.9, ge=0, lt=1)
    b2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    max_grad_norm: float | None = Field(1.0, gt=0)
    """Global-norm clip; null: none."""
    moment_dtype: DType = "float32"
    """Storage of both Adam moments; their arithmetic is float32, and what is stored in bfloat16 is rounded stochastically."""

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
    freeze: list[str] = []
    """Parameters that do not train, as patterns over their names, e.g. ``[embedding, "layers.mlp.*"]``."""
    save_every: NonNegative = 0
    """Steps between checkpoints; 0: only the last step."""
    keep_checkpoints: Positive = 2
    """Older checkpoints are deleted."""
    max_skipped_updates: NonNegative | None = None
    """Updates of a run whose loss or gradient is not finite that are skipped (weights and moments stay bit for bit) before
    one more ends it, after saving; null: the first one ends it. Their batches are kept for ``scripts/replay.py``."""
    eval_every: NonNegative = 0
    """Steps between evaluations; 0: only at the end."""
    profile_steps: Annotated[list[Positive], Field(min_length=2, max_length=2)] | None = None
    """Write a trace of XLA for these steps, [first, last], to RUN/profile; both are in it. Null: none."""
    tensorboard: bool = False
    """Also write TensorBoard events (needs the package tensorboardX)."""
    wandb: str | None = None
    """Also log to this Weights & Biases project (needs the package wandb)."""
    trackio: str | None = None
    """Also log to this trackio project (needs the package trackio)."""
    mlflow: str | None = None
    """Also log to this MLflow experiment, where ``MLFLOW_TRACKING_URI`` says (needs the package mlflow)."""

    @model_validator(mode="after")
    def _one_length(self):
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of train.steps and train.epochs")
        return self

    @model_validator(mode="after")
    def _profile(self):
        if self.profile_steps and self.profile_steps[0] > self.profile_steps[1]:
            raise ValueError(f"train.profile_steps {self.profile_steps}: write [first, last], e.g. [10, 13]")
        return self


class SftTrain(Train):
    neftune_alpha: float | None = Field(None, gt=0)
    """NEFTune (arXiv 2310.05914): uniform noise of alpha / sqrt(L D) on the embeddings in training, 5 in the paper."""


class SftTeacher(Section):
    weights: str | None = None
    """What forward_kl, reverse_kl, jsd, the skewed ones and adaptive_kl distil: a model with the same tokenizer, Hugging Face
    directory, hub id or run."""


class Reference(Section):
    refresh_every: Positive | None = None
    """Steps after which the model that asft, sft_kl, iw_sft, rho1 and psft compare with becomes the one that they trained;
    checkpoints hold it then. null: it stays what the run started from. psft needs a number (8 in its authors' code)."""


class Grading(Section):
    workers: Positive = 2
    """Grading processes."""
    timeout_s: float = Field(10.0, gt=0)
    """A grader that takes longer on an answer is killed; its problem is left out and counted in ``ungraded``."""


class Grader(Grading):
    grader: str = "accuracy"
    """The reward that decides what is right (1): ``accuracy``, ``countdown``, ``reasoning_gym``, or your own."""


class Eval(Grader):
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


class Draw(Section):
    temperature: float = Field(0.0, ge=0)
    """0: greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: NonNegative = 0
    """0: all."""
    min_p: Fraction = 0.0
    max_completion_tokens: Positive = 1024


class Decode(Draw):
    """Overrides of generate.py and evaluate.py."""

    slots: Positive = 32
    """Sequences decoded at once."""
    seed: Seed = 0
    system_prompt: str | None = None
    template: str | None = None
    """Chat template: a Jinja file, or null for the tokenizer's own."""
    compute_dtype: DType = "float32"
    attention: Literal["auto", "cudnn", "blockwise", "reference"] = "auto"


class Task(Grading, Decode):
    """Overrides of evaluate.py."""

    grader: str | None = None
    """The reward that decides what is right (1); null: the task's own, ``reasoning_gym`` for its problems, else ``accuracy``."""
    split: str | None = None
    """Split of the task; null: the benchmark's own, ``eval`` of a source that a program writes, else ``test``."""
    first: NonNegative = 0
    """The first problem, from 0; Tree of Thoughts' Game of 24 begins with 900."""
    problems: Positive = 500
    """At most this many problems."""
    protocol: Literal["direct", "cot"] | None = None
    """How a benchmark is asked: for the answer alone, or with a chain of thought; null: ``cot``. A source is asked as it is."""
    shots: NonNegative = 0
    """Examples that a benchmark shows first, with their solutions for ``cot``: earlier turns of the conversation."""
    shots_from: str | None = None
    """A file or directory of those examples; null: the benchmark's own split of them."""


def check_lora(lora: Lora, model: Model, train: Train) -> None:
    """What adapters do not combine with in every kind of run. Raises ValueError."""
    if lora.rank is None:
        return
    if model.weights is None:
        raise ValueError("lora.rank: adapters change a model that is there, and random weights are none: set model.weights")
    if train.freeze:
        raise ValueError("train.freeze: beside adapters everything is frozen already; choose what they change by lora.targets")


class SftConfig(Section):
    algorithm: Literal["sft"]
    run: Run
    model: Model
    lora: Lora = Lora()
    data: Data
    loss: SftLoss = SftLoss()
    teacher: SftTeacher = SftTeacher()
    reference: Reference = Reference()
    optimizer: Optimizer = Optimizer()
    train: SftTrain
    eval: Eval = Eval()
    mesh: Mesh = Mesh()
    resolved: Resolved = Resolved()

    @model_validator(mode="after")
    def _length_of_stream(self):
        if self.data.streaming and self.train.steps is None:
            raise ValueError(
                "data.streaming: how many steps train.epochs are nobody knows before the end of the stream: set "
                "train.epochs=null and train.steps"
            )
        return self

    @model_validator(mode="after")
    def _adapters(self):
        check_lora(self.lora, self.model, self.train)
        if self.lora.rank is not None and self.reference.refresh_every is not None:
            raise ValueError(
                "reference.refresh_every: beside adapters the reference is the model without them, which is not copied; "
                "leave it null"
            )
        return self
