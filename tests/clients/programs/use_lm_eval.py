"""lm-eval's local-completions: log-likelihoods by echo and logprobs, texts until a stop, by text and by token ids."""

import os

os.environ["OPENAI_API_KEY"] = os.environ["LLMD_TEST_KEY"]

from common import URL, tell
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

PAIRS = [("The capital of", " France is Paris."), ("1 + 1 equals", " two"), ("a b c", " d e f g")]


def ask(kind, *arguments):
    """lm-eval's own form of a question."""
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def model(**settings):
    """lm-eval's client; the tokenizer is the daemon's own."""
    return LocalCompletionsAPI(
        model="demo", base_url=f"{URL}/v1/completions", tokenizer_backend="remote", auth_token=os.environ["LLMD_TEST_KEY"],
        max_length=200, max_retries=1, num_concurrent=1, **settings,
    )  # fmt: skip


by_ids = model(tokenized_requests=True)
batched = model(tokenized_requests=True, batch_size=3)
until = ask("generate_until", "What is 2 + 3?", {"until": ["\n"], "max_gen_toks": 12, "temperature": 0})
tell(
    pairs=PAIRS,
    single=by_ids.loglikelihood([ask("loglikelihood", *pair) for pair in PAIRS]),
    batched=batched.loglikelihood([ask("loglikelihood", *pair) for pair in PAIRS]),
    rolling=by_ids.loglikelihood_rolling([ask("loglikelihood_rolling", "One two three.")]),
    text=by_ids.generate_until([until])[0],
)
