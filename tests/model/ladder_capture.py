"""What a GPU does with decode steps, on a CPU: places of a ladder of sizes, and graphs that do their work again."""

from llmd.model.cuda_graphs import CudaCapture


class Again:
    """Work that is done again into the same memory."""

    def __init__(self, work, result):
        self._work, self._result = work, result
        self.replays = 0

    def replay(self):
        self.replays += 1
        self._result.copy_(self._work())


class LadderCapture(CudaCapture):
    """CudaCapture whose graphs do their work again."""

    def record(self, work):
        result = work()
        return result, Again(work, result), ""
