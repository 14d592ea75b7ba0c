"""A model whose every answer is written down: byte tokens, prompts as they are asked, and a record of what was asked."""

import numpy as np

from jaxreason.evaluate.ask import Model, Query
from jaxreason.sampler import Completion

STOP = 0


class Bytes:
    """A token is a byte."""

    def encode(self, text):
        return list(text.encode())

    def encode_continuations(self, texts):
        return [self.encode(text) for text in texts]

    def decode(self, ids):
        return bytes(int(i) for i in ids).decode(errors="replace")


class Plain:
    """A prompt is the conversation's texts, a line each; the assistant's turn begins after a ``>``."""

    def render_prompt(self, example):
        return "\n".join([text for _, text in example.history] + [example.user]) + "\n>"


class Script:
    """``reply(prompt, sample)`` is what the model says; what is longer than the limit is cut. ``asked``: prompts, in order."""

    def __init__(self, reply):
        self.reply, self.asked, self.jobs, self.longest = reply, [], [], {}

    def generate(self, prompts, job, progress=None):
        self.jobs.append(job)
        found = []
        for index, ids in enumerate(prompts):
            prompt = Bytes().decode(ids)
            self.asked.append(prompt)
            for sample in range(job.samples):
                said = self.reply(prompt, sample)
                text, logp = said if isinstance(said, tuple) else (said, -1.0)
                tokens = np.array([*text.encode(), STOP], np.int32)[: job.sampling.max_completion_tokens]
                truncated = tokens[-1] != STOP
                each = np.full(len(tokens), logp, np.float32)
                found.append(Completion(index, sample, tokens, each, each, bool(truncated), 0))
        return found


def model(reply, slots=4):
    return Model(Script(reply), Bytes(), Plain(), seed=0, slots=slots)


def query(example, sampling, **more):
    known = {"samples": 1, "answer": lambda text: text.rpartition("=")[2].strip() or None, "decode": Bytes().decode,
             "rate": lambda name, texts: [float(len(text)) for text in texts]}  # fmt: skip
    return Query(example, sampling, **known | more)
