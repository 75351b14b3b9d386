"""CUDA graphs that follow re-planning: capture once, launch every step.

    plan.plan(indptr, indices, last_page_len)       # before the capture, within the plan's maxima
    with raddle.Graph(device="cuda") as graph:
        plan.run(q, cache, out=out)
    ...
    plan.plan(next_indptr, ...)                     # a new batch: nothing is captured again
    graph.launch()

What is captured is a function of addresses, not of batches: kernels read how much there is to do
from memory that plan() fills. A batch beyond the plan's maxima is a CapacityError, and from then on
the graph is stale.
"""

from . import _core

__all__ = ["Graph"]


class Graph:
    """Captured GPU work, launched as one.

    device: the GPU whose work is captured ("cuda" is cuda:0); work for another one is a
    DeviceError. stream: what to capture on, an integer CUstream or an object with `.cuda_stream`;
    by default a stream of the graph's own. The legacy default stream (0) cannot be captured: given
    that, the graph captures on its own stream too and launches on 0.

    `with graph:` captures what this thread runs: calls of raddle whose `stream=` is not given go to
    the captured stream. Work of other libraries is captured if they are told to use
    `graph.stream`. Plan before, and once more if you like between launches; planning, allocating by
    raddle, waiting and compiling in the block raise StateError, and the capture stays whole. Make
    results by `out=`, or by an allocator that does not call the driver during a capture. Tensors,
    plans and layers that were used stay alive as long as the graph.

    An exception in the block ends the capture and leaves a graph that is only good to be dropped.
    CPU devices raise UnsupportedError: work there is done when a call returns.

    Launch from one thread at a time. Graphs with linear layers share scratch memory: launches on
    different streams are put one behind the other.
    """

    def __init__(self, *, device="cuda", stream=None):
        self._graph = _core.Graph(device, stream)

    def __enter__(self):
        self._graph.begin()
        return self

    def __exit__(self, kind, error, traceback):
        if kind is None:
            self._graph.end()
        else:
            self._graph.abort()

    def launch(self, stream=None):
        """Run the graph on stream; by default on the one given at its making, else the legacy one.

        Waits there for the last plan() of every captured plan, whatever stream that went to; a
        later plan() on another stream must be ordered behind the launch by the caller. Returns at
        once. Raises StateError for a graph that is not captured, stale or dead; CudaError when the
        driver refuses. One that calls itself asynchronous (work queued before has failed, and the
        CUDA context is lost) leaves the graph dead, in state "failed".
        """
        self._graph.launch(stream)

    @property
    def stream(self):
        """The captured stream, as an integer handle."""
        return self._graph.stream

    @property
    def state(self):
        """ "new", "capturing", "ready", "stale" (a plan outgrew it) or "failed"."""
        return self._graph.state

    def __repr__(self):
        return f"<raddle.Graph {self.state}>"
