"""What the benchmarks against TRL share: weights that both sides load, and turns in processes of their own."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable


def random_llama(vocabulary: int, width: int, mlp: int, layers: int, heads: int, kv_heads: int, head_dim: int, **ids):
    """A tied Llama of transformers' own initialisation, always the same; ``ids`` are its bos, eos and pad ids."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, tie_word_embeddings=True,
        max_position_embeddings=8192, **ids,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def step_clock(seconds: list[float]):
    """A callback of transformers' Trainer that appends the seconds of every optimizer step."""
    import time

    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.begin = time.perf_counter()

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - self.begin)

    return Clock()


def answer(side: Callable[[], object]) -> None:
    """Runs one side's turn in this process and hands its result to :func:`by_turns`."""
    print("RESULT " + json.dumps(side()))


def by_turns(script: str, sides: Iterable[str], rounds: int, words: list[str]) -> dict[str, list]:
    """Each side's results, one a round: ``script --side SIDE words…``, so that load on the machine meets all sides."""
    found: dict[str, list] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, results in found.items():
            done = subprocess.run([sys.executable, script, "--side", side, *words], capture_output=True, text=True)
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if not lines:
                sys.exit(f"{side} failed:\n{done.stderr[-3000:]}")
            results.append(json.loads(lines[-1].removeprefix("RESULT ")))
    return found
