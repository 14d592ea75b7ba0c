"""What a comparison's data support, and what they do not, in sentences."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxreason.compare.tables import Standing, difference, standings
from jaxreason.report.charts import short
from jaxreason.report.read import Variant
from jaxreason.report.stats import Estimate

_SAME = 0.999  # cosine from which two gradients are called one direction


@dataclass
class Headline:
    """``lead`` in one sentence; then what holds, and what nobody can say from these data."""

    lead: str
    supported: list[str] = field(default_factory=list)
    unsupported: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For the terminal."""
        return [
            self.lead,
            *(f"  supported: {sentence}" for sentence in self.supported),
            *(f"  not supported: {sentence}" for sentence in self.unsupported),
        ]


def headline(variants: Sequence[Variant], measured: dict | None) -> Headline:
    """Of trained runs, of an offline measurement, or of both."""
    found = _of_runs(variants) if variants else Headline("Nothing was trained: the losses are compared on one rollout.")
    if measured:
        found.supported += _of_gradients(measured)
        if not variants:
            found.unsupported.append("which loss trains better: a gradient says where a step goes, not where a run ends")
        found.unsupported.append("gradients of other prompts, seeds or stages of training: one rollout was measured")
    return found


# ---- trained runs


def _of_runs(variants: Sequence[Variant]) -> Headline:
    found = standings(variants)
    if not found:
        return Headline(
            "No run was evaluated on held-out problems, so no loss can be called better.",
            unsupported=["any ranking: rewards and losses are of what was trained on; set eval.problems, or data.eval_source"],
        )
    first, others = found[0], found[1:]
    result = Headline(_lead(first, others))
    for s in found:
        if s.gain and s.gain.excludes_zero:
            verb = "raised" if s.gain.mean > 0 else "lowered"
            result.supported.append(f"training with {s.label} {verb} held-out accuracy: {_points(s.gain)}")
        elif s.gain and s.gain.low is not None:
            result.unsupported.append(f"that training with {s.label} changed held-out accuracy: {_points(s.gain)}")
    for s in others:
        if s.ahead and s.ahead.excludes_zero:
            result.supported.append(f"{s.label} ends {_side(s.ahead)} {first.label}: {_points(s.ahead)}")
        else:
            result.unsupported.append(f"that {s.label} differs from {first.label}: {_why(s)}")
    if len(others) > 1:
        names = _listed([s.label for s in others])
        result.unsupported.append(f"any order among {names}: only differences from {first.label} are tested")
    unfinished = sum(run.summary is None for v in variants for run in v.runs)
    if unfinished:
        result.unsupported.append(f"what finished training gives: {unfinished} of the runs are not finished")
    config = variants[0].runs[0].config
    result.unsupported.append(
        f"other tasks, models, learning rates or lengths of training: these runs are of {config['data']['source']} at "
        f"learning rate {config['optimizer']['learning_rate']:g}"
    )
    if all(run.config["train"].get("updates_per_rollout") == 1 for v in variants for run in v.runs):
        result.unsupported.append("what the losses make of the ratio: with one update a rollout it is 1 everywhere")
    return result


def _lead(first: Standing, others: Sequence[Standing]) -> str:
    if not others:
        return f"One loss, {first.label}: there is nothing to compare it with."
    shown = [s for s in others if s.ahead and s.ahead.excludes_zero]
    if len(shown) == 1:
        return f"{shown[0].label} ends {_side(shown[0].ahead)} {first.label}: {_points(shown[0].ahead)}."
    if shown:
        sides = {side: [s.label for s in shown if _side(s.ahead) == side] for side in ("above", "below")}
        parts = [f"{_listed(names)} {'ends' if len(names) == 1 else 'end'} {side}" for side, names in sides.items() if names]
        return f"Of {len(others)} losses {len(shown)} can be told from {first.label}: {'; '.join(parts)}."
    if min(s.seeds for s in (first, *others)) == 1:
        return "No loss can be called better: with one seed the spread between seeds is unknown."
    return f"No loss can be told from {first.label} by held-out accuracy: every interval of a difference holds 0 or is not known."


def _side(found: Estimate | None) -> str:
    return "above" if found and found.mean > 0 else "below"


def _points(found: Estimate | None) -> str:
    """``+3.1 points (+1.0 to +5.2)``."""
    mean, _, around = difference(found).rstrip(" ▲▼").partition(" ")
    return f"{mean} points {around}".rstrip()


def _why(s: Standing) -> str:
    if s.obstacle:
        return s.obstacle
    if s.ahead is None or s.ahead.low is None or s.ahead.high is None:
        return f"{_points(s.ahead)} without an interval" if s.ahead else "no pair of runs"
    half = 100 * (s.ahead.high - s.ahead.low) / 2
    return f"{_points(s.ahead)}; nothing below about {half:.1f} points could have been seen"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


# ---- gradients


def _of_gradients(measured: dict) -> list[str]:
    names, found = measured["losses"], []
    places = {"start": "at ratio 1", "stale": f"after one step of {names[0]}"}
    for point, place in places.items():
        cosines, rows = measured["points"][point]["cosine"], measured["points"][point]["rows"]
        same = [name for name, row in zip(names[1:], cosines[1:]) if row[0] is not None and row[0] > _SAME]
        if same:
            found.append(f"{place}, {_listed(same)} and {names[0]} step in one direction (cosine above {_SAME})")
        apart = [(row[j], name, names[j]) for i, (name, row) in enumerate(zip(names, cosines)) for j in range(i)]
        known = [(c, a, b) for c, a, b in apart if c is not None]
        if known and min(known)[0] <= _SAME:
            cosine, a, b = min(known)
            found.append(f"{place}, {b} and {a} are furthest apart: cosine {cosine:.2f} on this rollout")
        norms = sorted((row["grad_norm"], name) for row, name in zip(rows, names) if row["grad_norm"])
        if norms and norms[-1][0] > 2 * norms[0][0]:
            (low, a), (high, b) = norms[0], norms[-1]
            times = f"{high / low:.1f} times as long as that of {a} ({short(high)}, {short(low)})"
            found.append(f"{place}, the gradient of {b} is {times}")
    return found
