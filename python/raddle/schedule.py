"""What an attention plan decided, for eyes and tests: work items, their ranges, expected bytes."""


class Schedule:
    """What a plan decided, as NumPy arrays.

    requests [batch] (qo_begin, qo_len, kv_begin, kv_len), segments [n] (request, head, row_begin,
    row_end, kv_begin, kv_end, slot, merge, and of the request qo_begin, qo_len, kv_origin,
    kv_len), merges [m] (request, head, row_begin, row_end,
    slot_begin, slot_count, ...), worker_indptr [workers + 1] into segments; config holds tile_rows,
    tile_kv, heads_per_item, segment_cost, token_bytes (K and V of a token and head) and the
    like."""

    def __init__(self, requests, worker_indptr, segments, merges, config):
        import numpy as np

        def table(data, *names):
            return np.frombuffer(data, dtype=[(name, np.int32) for name in names])

        self.requests = table(requests, "qo_begin", "qo_len", "kv_begin", "kv_len")
        self.segments = table(
            segments,
            "request",
            "head",
            "row_begin",
            "row_end",
            "kv_begin",
            "kv_end",
            "slot",
            "merge",
            "qo_begin",
            "qo_len",
            "kv_origin",
            "kv_len",
        )
        self.merges = table(
            merges,
            "request",
            "head",
            "row_begin",
            "row_end",
            "slot_begin",
            "slot_count",
            "num_arrivals",
            "qo_begin",
            "qo_len",
            "kv_len",
            "reserved_0",
            "reserved_1",
        )
        self.worker_indptr = np.frombuffer(worker_indptr, dtype=np.int32)
        self.config = config

    @property
    def segment_bytes(self):
        """K/V bytes that each segment reads, int64 [n]."""
        import numpy as np

        left = self.config["num_kv_heads"] - self.segments["head"]
        heads = np.minimum(self.config["heads_per_item"], left).astype(np.int64)
        return (
            (self.segments["kv_end"] - self.segments["kv_begin"])
            * heads
            * self.config["token_bytes"]
        )

    @property
    def worker_bytes(self):
        """K/V bytes that each worker reads, int64 [workers that have segments]."""
        import numpy as np

        sums = np.concatenate([[0], np.cumsum(self.segment_bytes)])
        share = sums[self.worker_indptr[1:]] - sums[self.worker_indptr[:-1]]
        return share[np.diff(self.worker_indptr) > 0]
