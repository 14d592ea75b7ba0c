"""Slow twins of the losses: Python loops over sequences and tokens in float64, written from the formulas alone."""

import numpy as np

MASK = np.array(
    [[1, 1, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0, 1], [0, 0, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]], np.float64
)
IDS = np.array([[7, 7, 7, 7, 2, 2, 2], [5, 5, 5, 5, 5, 9, 9], [-3] * 7, [1] * 7])
GROUPS = np.array([[0, 0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [1] * 7, [0] * 7])
EXPERT = np.isin(IDS, (9, 1))  # the data's own answers, where a test has some: 6 of the 16 tokens
EXTRAS = {"expert": np.where(EXPERT, 16 / 6, 0.0), "sampled": np.where(EXPERT, 0.0, 16 / 10), "step": np.full(MASK.shape, 3.0)}


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    """Random per-token inputs [4, 7]; rows 0 and 1 hold two sequences. Advantages differ from token to token."""
    rng = np.random.default_rng(seed)
    shape = MASK.shape
    logp = -np.abs(rng.normal(size=shape)) - 0.1
    old_logp = logp + rng.normal(scale=0.35, size=shape)
    return {
        "logp": logp,
        "old_logp": old_logp,
        "advantages": rng.normal(size=shape),
        "ref_logp": old_logp + rng.normal(scale=0.3, size=shape),
        "sampler_logp": old_logp + rng.normal(scale=0.2, size=shape),
        "entropy": np.abs(rng.normal(size=shape)) + 0.1,
        "logsumexp": rng.normal(size=shape),
        "mean_logp": -3 - np.abs(rng.normal(size=shape)),
        "ref_kl": np.abs(rng.normal(size=shape)),
        "teacher_divergence": np.abs(rng.normal(size=shape)),
        "topk_entropy": np.abs(rng.normal(size=shape)),
        "token_weights": np.abs(rng.normal(size=shape)),
        **EXTRAS,
    }


def sequences() -> list[list[tuple[int, int]]]:
    """The supervised positions of every sequence."""
    found: dict[int, list[tuple[int, int]]] = {}
    for b in range(MASK.shape[0]):
        for t in range(MASK.shape[1]):
            if MASK[b, t]:
                found.setdefault(int(IDS[b, t]), []).append((b, t))
    return list(found.values())


class Seq:
    """One sequence: ``x`` are its values, ``x0`` the same with what stop-gradient holds fixed."""

    def __init__(self, data: dict, frozen: dict, where: list[tuple[int, int]]):
        self.where = where
        for key in data:
            setattr(self, key, [float(data[key][p]) for p in where])
            setattr(self, key + "0", [float(frozen[key][p]) for p in where])
        self.n = len(where)

    def ratio(self, t: int) -> float:
        return float(np.exp(self.logp[t] - self.old_logp[t]))

    def mean_log_ratio(self, frozen: bool = False) -> float:
        logp = self.logp0 if frozen else self.logp
        return sum(logp[k] - self.old_logp[k] for k in range(self.n)) / self.n


def clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def ppo(w: float, a: float, low: float, high: float) -> float:
    return -min(w * a, clip(w, 1 - low, 1 + high) * a)


def aggregate(name: str, token_loss, data: dict, frozen: dict, constant: float = 1.0) -> float:
    """The aggregations as loops."""
    seqs = [Seq(data, frozen, where) for where in sequences()]
    losses = [[token_loss(seq, t) for t in range(seq.n)] for seq in seqs]
    total_tokens = sum(seq.n for seq in seqs)
    if name == "seq-mean-token-mean":
        return sum(sum(row) / len(row) for row in losses) / len(losses)
    if name == "token-mean":
        return sum(sum(row) for row in losses) / total_tokens
    if name == "seq-mean-token-sum":
        return sum(sum(row) for row in losses) / len(losses)
    if name == "token-sum":
        return sum(sum(row) for row in losses)
    if name == "token-sum/const":
        return sum(sum(row) for row in losses) / (len(losses) * constant)
    if name == "seq-sqrt":
        return sum(sum(row) / len(row) ** 0.5 for row in losses) / len(losses)
    if name == "prompt-mean":
        per_group: dict[int, list[float]] = {}
        for seq, row in zip(seqs, losses):
            per_group.setdefault(int(GROUPS[seq.where[0]]), []).extend(row)
        return sum(sum(g) / len(g) for g in per_group.values()) / len(per_group)
    raise KeyError(name)


def finite_difference(function, data: dict, key: str, step: float = 1e-6) -> np.ndarray:
    """Central differences of function(data, frozen) by ``data[key]``, ``frozen`` held."""
    grad = np.zeros(MASK.shape)
    for where in np.ndindex(*MASK.shape):
        values = []
        for sign in (1, -1):
            moved = dict(data) | {key: data[key].copy()}
            moved[key][where] += sign * step
            values.append(function(moved, data))
        grad[where] = (values[0] - values[1]) / (2 * step)
    return grad
