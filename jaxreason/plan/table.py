"""A plan for people."""

from rich.console import Console
from rich.table import Table

GIB = 2**30


def show(report: dict, console: Console) -> None:
    """Prints memory, programs, speed, cost and, where it does not fit, what would."""
    devices = report["hosts"] * report["devices_per_host"]
    batch, model = report["batch"], report["model"]
    console.print(
        f"[bold]{report['config']}[/] on {report['hosts']} x {report['devices_per_host']} {report['card']}, "
        f"mesh {' x '.join(f'{axis} {size}' for axis, size in report['mesh'].items())}\n"
        f"{model['parameters']:,} parameters ({model['source']}); attention {model['attention']}, "
        f"remat {model['remat']}; {batch['rows']} rows x "
        f"{batch['tokens_per_row']} tokens a step in {batch['microbatches']} microbatches"
    )
    if report["needed_words"]:
        console.print(f"these devices need: [bold]{' '.join(report['needed_words'])}[/]")
    _memory(report, console)
    _programs(report, console)
    _collectives(report, console, devices)
    _speed(report, console, devices)
    for change in report.get("changes", ()):
        where = [f"--devices {change['devices']}"] if change["devices"] != report["devices_per_host"] else []
        verdict = "[green]fits[/]" if change["fits"] else "[red]does not fit[/]"
        console.print(f"{verdict} with {' '.join([*change['words'], *where])}: {_gib(change['total'])}")
    if "changes" in report and not any(change["fits"] for change in report["changes"]):
        console.print("none of these changes fits; use more devices or a shorter data.max_length")


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def _memory(report: dict, console: Console) -> None:
    memory = report["memory"]
    table = Table(title="memory of one device", title_justify="left", show_header=False)
    labels = {
        "parameters": "parameters", "optimizer": "optimizer state", "gradients": "gradients (float32)",
        "activations": "activations and everything else of the step", "reference_model": "reference model",
        "teacher_model": "teacher model", "decoding_weights": "weights for decoding, while it lasts",
        "kv_cache": "caches for decoding, while it lasts",
    }  # fmt: skip
    for key, label in labels.items():
        if key in memory:
            table.add_row(label, _gib(memory[key]))
    table.add_row(f"most at once ({memory['largest_program']})", f"[bold]{_gib(memory['total'])}[/]")
    table.add_row("allowed: 0.92 of the card less 2 GiB", _gib(memory["limit"]))
    table.add_row("the card", _gib(memory["card"]))
    verdict = "[green]fits[/]" if memory["fits"] else "[red]does not fit[/]"
    table.add_row(verdict, f"{_gib(memory['spare'])} to spare on the card")
    console.print(table)


def _programs(report: dict, console: Console) -> None:
    table = Table("program", "arguments", "temporary", "beside it", "total", "compiled",
                  title="programs, each compiled; GiB of one device", title_justify="left")  # fmt: skip
    for p in report["programs"]:
        sizes = (p["argument_bytes"], p["temp_bytes"], sum(p["resident_bytes"].values()), p["total_bytes"])
        table.add_row(p["name"], *(f"{size / GIB:.1f}" for size in sizes), f"{p['compile_seconds']:.0f} s")
    console.print(table)
    forward, backward = report["attention_per_layer"]
    calls = f"cuDNN's attention runs {forward:.2f} times forward and {backward:.2f} backward in a layer of a microbatch"
    head = f" (of them {report['recompute_head']:.2f}: the head makes its logits again)" if report["recompute_head"] else ""
    console.print(
        f"remat {report['model']['remat']}: the update's matrix products are {report['recompute']:.2f} x those of a step "
        f"without recomputation{head}; " + (calls if backward else "they include attention's own, which is no kernel here")
    )
    beside = {name: size for p in report["programs"] for name, size in p["resident_bytes"].items()}
    if beside:
        console.print("beside them: " + ", ".join(f"{name} {_gib(size)}" for name, size in beside.items()))


def _collectives(report: dict, console: Console, devices: int) -> None:
    if devices == 1:
        return
    table = Table("program", "collective", "times", "array", "in all", title="collectives of one step",
                  title_justify="left")  # fmt: skip
    for p in report["programs"]:
        for one in p["collectives"]:
            if one["total_bytes"] >= 2**20:
                size = f"{one['bytes'] / 2**20:.1f} MiB"
                table.add_row(p["name"], one["kind"], str(one["times"]), size, _gib(one["total_bytes"]))
        if p["collectives"]:
            table.add_row(p["name"], "all, on the links alone", "", "", f"{p['collective_seconds']:.2f} s")
    console.print(table)


def _speed(report: dict, console: Console, devices: int) -> None:
    speed, train = report["speed"], report["speed"]["train"]
    table = Table("where an update's time goes", "s", "share", title_justify="left",
                  title=f"predicted: {train['step_seconds']:.3g} s an update, {train['tokens_per_second']:,.0f} tokens/s "
                  f"({train['tokens_per_second'] / devices:,.0f} a GPU), MFU {train['mfu']:.1%}")  # fmt: skip
    for kind, seconds in train["kinds"].items():
        table.add_row(kind, f"{seconds:.3g}", _bar(seconds / train["step_seconds"]))
    console.print(table)
    bounds = {"compute": "compute at peak, what is computed again included", "memory": "reading and writing the state once",
              "links": "collectives alone"}  # fmt: skip
    least = ", ".join(f"{speed['roofline_seconds'][name]:.2f} s of {what}" for name, what in bounds.items())
    console.print(f"at least an update takes {least}")
    if decode := speed.get("decode"):
        console.print(
            f"decoding: {decode['step_seconds'] * 1e3:.2f} ms a step, {decode['tokens_per_second_per_device']:,.0f} tokens/s a "
            f"GPU, {decode['tokens_per_second_per_device'] / decode['limit_per_device']:.0%} of what memory bandwidth allows "
            f"({decode['slots_per_device']} slots, mean context {decode['mean_context']:.0f}, "
            f"{decode['kv_bytes_per_token']:,} bytes of cache a token)"
        )
    if phases := speed.get("phases"):
        whole = sum(phases.values())
        table = Table("phase", "s", "share", title=f"a GRPO step: {whole:.3g} s, if every completion is as long as allowed and "
                      "no group is drawn again", title_justify="left")  # fmt: skip
        for name, seconds in phases.items():
            table.add_row(name, f"{seconds:.3g}", _bar(seconds / whole))
        console.print(table)
    steps = f"{speed['updates']} updates" if speed["updates"] else "updates unknown: give --examples or train.steps"
    cost = "{hours:.3g} hours, {usd:.0f} USD; ".format(**speed["recipe"]) if "recipe" in speed else ""
    console.print(
        f"{steps}; {cost}{speed['usd_per_gpu_hour']:.2f} USD a GPU hour (--price). Start, evaluation, grading and checkpoints "
        f"come on top. {speed['flops_per_token'] / 1e9:.2f} GFLOP a token: 6 for every weight of a matrix "
        "product (4 beside adapters), and causal "
        f"attention within documents of {speed['document_tokens']} tokens (--document-tokens); recomputed work is not counted."
    )
    console.print(
        "Seconds are predicted from the compiled program with rates measured on this card"
        if speed["rates_of"] == report["target"]
        else f"Seconds are predicted with the rates of {speed['rates_of']}: none were measured on {report['target']}"
    )


def _bar(share: float) -> str:
    return f"{share:4.0%} {'█' * round(20 * share)}"
