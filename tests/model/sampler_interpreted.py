"""Steps of random mixtures by both samplers, Triton's in the interpreter; prints what differed.

Both take exp from numpy, as the interpreter does: then tokens must be equal to the last one. `other_exp` says how many of
the plain draws differ when torch's own exp is taken.
"""

import json
import random

import numpy as np
import torch
from model.sampling_reference import CPU, MAX_LEN, NUM_ROWS, V, make_admit

from llmd.model import cuts, sampler
from llmd.model.logits import LogitsContext
from llmd.model.sampler import SamplerContext, TorchSampler
from llmd.model.sampler_triton import TritonSampler
from llmd_plugins.sampling.bad_words.processor import BadWords

torch_exp = cuts.probabilities


def probabilities(x, maxima, inverse_temperature):
    """draw.probabilities with numpy's exp."""
    return torch.from_numpy(np.exp(x.sub(maxima.unsqueeze(1)).mul_(inverse_temperature.unsqueeze(1)).numpy()))


def use(function):
    cuts.probabilities = sampler.probabilities = function


CHOICES = {
    "temperature": (0.0, 0.2, 1.0, 1.7),
    "top_k": (-1, 1, 5, 129, 250, V, V + 5),
    "top_p": (0.05, 0.5, 0.9, 0.999),
    "min_p": (1e-4, 0.05, 0.5, 1.0),
    "presence_penalty": (-2.0, 0.3, 2.0),
    "frequency_penalty": (-1.0, 0.7),
    "repetition_penalty": (0.5, 1.3, 2.0),
    "logit_bias": ({3: 5.0, 7: -100.0}, {V - 1: 20.0}, {0: -0.25, 1: 0.5, 2: 1.0}),
    "logprobs": (0, 1, 5),
}
OTHERS = {
    "allowed_token_ids": ([1, 2, 3, 200], [299]),
    "min_tokens": (3, 6),
    "stop_token_ids": ([1, 5], [2]),
    "bad_words_ids": ([[1]], [[2, 3], [4]]),
}
chance = random.Random(0)


def some_admit(row, choices):
    wishes = {name: chance.choice(values) for name, values in choices.items() if chance.random() < 0.3}
    tokens = [chance.randrange(9) if chance.random() < 0.7 else chance.randrange(V) for _ in range(chance.randint(1, 20))]
    seed = chance.randrange(-(1 << 63), 1 << 64)
    return make_admit(row, tokens=tokens, num_prompt=chance.randint(1, len(tokens)), seed=seed, eos=[0], **wishes)


def made(kind):
    facts = LogitsContext(max_num_rows=NUM_ROWS, max_model_len=MAX_LEN, vocab_size=V, device=CPU)
    others = [BadWords(facts)]
    return kind(
        SamplerContext(max_num_rows=NUM_ROWS, max_model_len=MAX_LEN, vocab_size=V, device=CPU, logits_processors=others)
    )


def step(sampler, logits, admits, is_new):
    token_ids = torch.full((NUM_ROWS, MAX_LEN), -7, dtype=torch.int32)
    for admit in admits:
        token_ids[admit.row, : len(admit.token_ids)] = torch.tensor(admit.token_ids, dtype=torch.int32)
        if is_new:
            sampler.admit(admit)
    rows, counts = torch.tensor([a.row for a in admits]), torch.tensor([len(a.token_ids) for a in admits])
    known = {"host_rows": rows.tolist(), "max_tokens": int(counts.max())} if is_new else {}
    return sampler.sample(logits.clone(), rows, counts, token_ids, **known).to_host().result()


use(probabilities)
samplers = made(TorchSampler), made(TritonSampler)
found = {"steps": 0, "tokens": 0, "other tokens": 0, "other errors": 0, "other logprobs": 0, "largest logprob error": 0.0}
for turn in range(9):
    rows = chance.sample(range(NUM_ROWS), 6)
    admits = [some_admit(row, CHOICES | OTHERS if turn % 2 else CHOICES) for row in rows]
    logits = torch.randn(len(admits), V) * (0.5 if turn % 3 else 4.0)
    if turn == 4:
        logits[1, 7], logits[2, 3] = float("nan"), float("inf")
    expected, actual = (step(sampler, logits, admits, is_new=True) for sampler in samplers)
    if turn == 5:  # the same rows once more, nothing new on the device
        expected, actual = (step(sampler, logits, admits, is_new=False) for sampler in samplers)
    found["steps"] += 1
    found["tokens"] += len(admits)
    found["other errors"] += expected.errors != actual.errors
    good = [at for at, admit in enumerate(admits) if admit.row not in expected.errors]
    found["other tokens"] += sum(expected.token_ids[at] != actual.token_ids[at] for at in good)
    found["other logprobs"] += expected.logprobs.keys() != actual.logprobs.keys()
    for row, (entry,) in expected.logprobs.items():
        (mine,) = actual.logprobs[row]
        found["other logprobs"] += (entry.token_id, entry.rank, entry.top_ids) != (mine.token_id, mine.rank, mine.top_ids)
        pairs = zip((entry.logprob, *entry.top_logprobs), (mine.logprob, *mine.top_logprobs), strict=True)
        error = max(abs(a - b) for a, b in pairs)
        found["largest logprob error"] = max(found["largest logprob error"], error)
for sampler_ in samplers:
    for row in range(NUM_ROWS):
        sampler_.release(row)

use(torch_exp)
admits = [make_admit(row, seed=row) for row in range(NUM_ROWS)]
logits = torch.randn(NUM_ROWS, V) * 3
both = [step(sampler, logits, admits, is_new=True).token_ids for sampler in samplers]
found["other_exp"] = sum(a != b for a, b in zip(*both, strict=True))
print(json.dumps(found))
