"""Called once a step on the executor thread, with the rows that want it; it must not wait for the device."""

from torch import Tensor

from llmd.api.v1 import RowAdmit, Rows, SamplingParams


class Zeta:
    """Bars the last token of each of its rows."""

    keeps_argmax = False  # greedy rows need it too

    def wants(self, params: SamplingParams) -> bool:
        return params.frequency_penalty == 2

    def admit(self, admit: RowAdmit) -> None:
        """Nothing is kept for a row."""

    def release(self, row: int) -> None:
        """Nothing is kept for a row."""

    def apply(self, logits: Tensor, rows: Rows) -> Tensor:
        last = rows.token_ids[rows.ids, rows.num_tokens - 1].long()
        logits[rows.at, last.clamp(0, logits.shape[1] - 1)] = float("-inf")
        return logits
