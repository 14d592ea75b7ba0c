"""The tables and figures of an offline measurement (:func:`jaxreason.compare.gradients.measure`)."""

from collections.abc import Sequence

from jaxreason.compare.probe import LOG_RATIOS
from jaxreason.report.charts import short
from jaxreason.report.figures import Bars, Chart, Dots, Figure, Heat, Line
from jaxreason.report.tables import Table

_POINTS = {"value": "value", "grad_norm": "gradient norm", "ratio_min": "lowest ratio", "ratio_max": "highest ratio",
           "clip_fraction": "clipped", "policy_kl": "KL to sampler", "kl": "KL to reference"}  # fmt: skip
_SIGNS = {"positive": "A > 0", "negative": "A < 0"}
_SHARE = 0.9  # of measured tokens within the log-ratios shown
_NARROWEST = 0.02  # nats on either side


def _places(measured: dict) -> dict[str, str]:
    """What the two policies are."""
    rate = measured["rollout"]["learning_rate"]
    return {
        "start": "at the policy that sampled, every ratio 1",
        "stale": f"after one step of {measured['losses'][0]} at learning rate {rate:g}",
    }


def offline_tables(measured: dict) -> list[Table]:
    """Values, norms and cosines of a measurement, at both policies."""
    names = measured["losses"]
    tables = []
    for name, place in _places(measured).items():
        rows, cosines = measured["points"][name]["rows"], measured["points"][name]["cosine"]
        keys = [key for key in _POINTS if any(key in row for row in rows)]
        cells = [[label, *(short(row.get(key)) for key in keys)] for label, row in zip(names, rows)]
        records = [{"loss": label} | {key: row.get(key) for key in keys} for label, row in zip(names, rows)]
        header = ["loss", *(_POINTS[key] for key in keys)]
        tables.append(Table(f"offline-{name}", f"Offline, {place}", header, cells, records=records))
        cells = [[label, *("–" if c is None else f"{c:.4f}" for c in row)] for label, row in zip(names, cosines)]
        records = [{"loss": label} | dict(zip(names, row)) for label, row in zip(names, cosines)]
        tables.append(
            Table(f"offline-{name}-cosine", f"Cosine between gradients, {place}", ["", *names], cells, records=records)
        )
    tables[-1].notes.append(described(measured))
    if measured["rollout"]["zero_std_fraction"] == 1:
        tables[-1].notes.append("No group differs in reward, so group-relative losses have no gradient here.")
    return tables


def described(measured: dict) -> str:
    """What was rolled out, in a sentence."""
    rollout = measured["rollout"]
    turns = f", each corrected {rollout['corrections']} times" if rollout["corrections"] else ""
    teacher = f", judged by the teacher {rollout['teacher']}" if rollout["teacher"] else ""
    return (
        f"One rollout of {rollout['model']}: {rollout['prompts']} prompts x {rollout['group_size']} of {rollout['data']}"
        f"{turns}{teacher}, seed {rollout['seed']}, {rollout['tokens']:,} tokens, mean reward {short(rollout['reward'])}, "
        f"{100 * rollout['zero_std_fraction']:.0f} % of the groups without a difference in reward."
    )


def indices(measured: dict, shown: Sequence[str]) -> list[int]:
    """The colour of every measured loss: that of the same name among ``shown``, or one after theirs."""
    others = iter(range(len(shown), len(shown) + len(measured["losses"])))
    return [shown.index(name) if name in shown else next(others) for name in measured["losses"]]


def offline_figures(measured: dict, colours: Sequence[int]) -> list[Figure]:
    """The curves that explain the losses, what was measured of them, and gradients as bars and as a map."""
    figures: list[Figure] = [
        found for make in (_curves, _dots) for sign in _SIGNS if (found := make(measured, sign, colours))
    ]
    for name, place in _places(measured).items():
        rows, names = measured["points"][name]["rows"], measured["losses"]
        figures += [
            Heat(
                f"offline-{name}-cosine", f"Cosine between gradients, {place}",
                "1: the same direction, whatever the length; 0: unrelated; below 0: one undoes the other. Rows and columns are "
                "the losses in one order.",
                names, measured["points"][name]["cosine"],
            ),
            Bars(
                f"offline-{name}-norm", f"Gradient norm, {place}",
                "Over all parameters, before clipping. At one learning rate, Adam hides most of a difference in length and "
                "optimizer.max_grad_norm cuts it; a difference in direction stays.",
                colours, names, [row["grad_norm"] for row in rows],
            ),
        ]  # fmt: skip
    return figures


def _curves(measured: dict, sign: str, colours: Sequence[int]) -> Chart | None:
    """What each loss gives a token; None where no loss gives anything finite."""
    steps = [round(float(x), 4) for x in LOG_RATIOS]
    lines = [
        Line.plain(index, label, steps, curve[sign])
        for index, label, curve in zip(colours, measured["losses"], measured["curve"])
        if any(value is not None for value in curve[sign])
    ]
    if not lines:
        return None
    note = (
        "Computed from the loss itself: −∂L/∂log p of a completion of one token with advantage "
        f"{'1' if sign == 'positive' else '−1'}, over its log-ratio (at the loss's own level: token or sequence); 1 is what a "
        "loss without ratio gives. Above 0 the token is made likelier; where a curve is 0 the loss no longer moves it. The "
        "reference is the old policy. Curves that coincide lie on one another, the first one thickest."
    )
    return Chart(f"weight-{sign}", f"Gradient weight of a token, {_SIGNS[sign]}", note, lines, axis="log-ratio", nested=True)


def _dots(measured: dict, sign: str, colours: Sequence[int]) -> Chart | None:
    """What each token of the rollout weighed; None where no advantage has this sign."""
    known = [tokens[sign] for tokens in measured["tokens"]]
    sizes = sorted(abs(ratio) for points in known for ratio, _ in points)
    if not sizes:
        return None
    limit = max(_NARROWEST, sizes[min(len(sizes) - 1, int(_SHARE * len(sizes)))])
    dots = [
        Dots(index, label, [(r, w) for r, w in points if abs(r) <= limit])
        for index, label, points in zip(colours, measured["losses"], known)
    ]
    outside = sum(size > limit for size in sizes) / len(sizes)
    note = (
        f"Measured {_places(measured)['stale']}: the weight of single tokens against their own log-ratio, divided by |A| and by "
        "the loss's median weight at ratio 1. Where a loss weighs sequences, a token's weight does not follow its own ratio."
        f"{f' {100 * outside:.0f} % of the tokens lie outside.' if outside else ''}"
    )
    return Chart(
        f"measured-weight-{sign}", f"Measured weight of tokens, {_SIGNS[sign]}", note, dots=_known(dots), axis="log-ratio"
    )


def _known(dots: Sequence[Dots]) -> list[Dots]:
    return [one for one in dots if one.points]
