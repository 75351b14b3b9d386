"""Variants for the tests of hooks: each as C text and as the NumPy functions that say the same.

Needs: numpy."""

from dataclasses import dataclass, field

import numpy as np
import raddle

from tests.reference.attention import Variant


@dataclass
class Case:
    """source and its declarations; args for a run over at most 200 query tokens, 8 heads (2 of K
    and V) and 64 dimensions; reference: keywords of the reference's Variant."""

    source: str
    reference: dict
    tensors: tuple = ()
    scalars: tuple = ()
    args: dict = field(default_factory=dict)
    softmax: bool = True

    def variant(self, name="case"):
        return raddle.Variant(
            name, self.source, tensors=self.tensors, scalars=self.scalars, softmax=self.softmax
        )


rng = np.random.default_rng(5)
HALF = 32
BIAS = rng.standard_normal((8, 33)).astype(np.float32)
SCALE = rng.uniform(0.5, 1.5, (2, 2 * HALF)).astype(np.float32)
GATE = rng.standard_normal((200, 8)).astype(np.float32)
SINK = rng.standard_normal(8).astype(np.float32)
PERIOD = np.array([[2, 3, 5, 2, 7, 3, 4, 2]], np.int32)
SEEN = rng.random((200, 64)) < 0.5


def swap_halves(row, x):
    return np.concatenate([x[HALF:] * 0.5, x[:HALF] + 0.25 * row.qo_head])


def relative_bias(row, keys, logits):
    distance = np.clip(keys - row.position, -16, 16) + 16
    return logits + BIAS[row.qo_head, distance] * 0.75


def every_period(row, keys):
    return keys % PERIOD[0, row.qo_head] == row.request % 2


def by_table(row, keys):
    return SEEN[row.token, keys % 64]


def own_sink(row, top, total):
    new = max(top, SINK[row.qo_head])
    return new, total * np.exp(top - new) + np.exp(SINK[row.qo_head] - new)


QUERY = """
raddle_pair raddle_variant_query(const raddle_variant *v, const raddle_row *row, int32_t dim,
                                 raddle_pair x) {
    raddle_pair y;
    y.low = x.high * v->half;
    y.high = x.low + 0.25f * (float)row->qo_head;
    return y;
}
"""

KEY = """
raddle_pair raddle_variant_key(const raddle_variant *v, const raddle_key *key, int32_t dim,
                               raddle_pair x) {
    const float *scale = v->scale.data + key->kv_head * v->scale.stride[0];
    const float sign = key->kv_index % 2 != 0 ? -1.0f : 1.0f;
    raddle_pair y;
    y.low = x.low * scale[dim * v->scale.stride[1]] * sign;
    y.high = x.high * scale[(dim + 32) * v->scale.stride[1]];
    return y;
}
"""

LOGIT = """
float raddle_variant_logit(const raddle_variant *v, const raddle_row *row, int32_t kv_index,
                           float logit) {
    int32_t distance = kv_index - raddle_row_position(row);
    distance = distance < -16 ? -16 : distance > 16 ? 16 : distance;
    return logit + v->factor * v->bias.data[row->qo_head * v->bias.stride[0] +
                                            (distance + 16) * v->bias.stride[1]];
}
"""

MASK = """
bool raddle_variant_mask(const raddle_variant *v, const raddle_row *row, int32_t kv_index) {
    return kv_index % v->period.data[row->qo_head * v->period.stride[1]] == row->request % 2;
}
"""

STATE = """
void raddle_variant_state(const raddle_variant *v, const raddle_row *row, float *max, float *sum) {
    raddle_sink(v->sink.data[row->qo_head], max, sum);
}
"""

OUTPUT = """
float raddle_variant_output(const raddle_variant *v, const raddle_row *row, int32_t dim, float x) {
    return x * v->gate.data[row->token * v->gate.stride[0] + row->qo_head * v->gate.stride[1]] +
           (float)dim;
}
"""


def flipped_keys(request, kv_index, kv_head, x):
    sign = np.where(np.arange(2 * HALF) < HALF, -1.0 if kv_index % 2 else 1.0, 1.0)
    return x * SCALE[kv_head] * sign


def gated(row, x):
    return x * GATE[row.token, row.qo_head] + np.arange(len(x))


CASES = {
    "query": Case(QUERY, dict(query=swap_halves), scalars=("half",), args=dict(half=0.5)),
    "key": Case(KEY, dict(key=flipped_keys), tensors=("scale",), args=dict(scale=SCALE)),
    "logit": Case(
        LOGIT,
        dict(logit=relative_bias),
        tensors=("bias",),
        scalars=("factor",),
        args=dict(bias=BIAS, factor=0.75),
    ),
    "mask": Case(
        MASK, dict(mask=every_period), tensors=(("period", "int32"),), args=dict(period=PERIOD)
    ),
    "state": Case(STATE, dict(state=own_sink), tensors=("sink",), args=dict(sink=SINK)),
    "output": Case(OUTPUT, dict(output=gated), tensors=("gate",), args=dict(gate=GATE)),
    "weights": Case(
        """
float raddle_variant_logit(const raddle_variant *v, const raddle_row *row, int32_t kv_index,
                           float logit) {
    const float x = logit > 0.0f ? logit : 0.0f;
    return x * x / (float)row->kv_len;
}
bool raddle_variant_mask(const raddle_variant *v, const raddle_row *row, int32_t kv_index) {
    return v->seen.data[row->token * v->seen.stride[0] + kv_index % 64] != 0;
}
""",
        dict(
            logit=lambda row, keys, logits: np.maximum(logits, 0) ** 2 / row.kv_len,
            mask=by_table,
            softmax=False,
        ),
        tensors=(("seen", "bool"),),
        args=dict(seen=SEEN),
        softmax=False,
    ),
    "all": Case(
        QUERY + KEY + LOGIT + MASK + STATE + OUTPUT,
        dict(
            query=swap_halves,
            key=flipped_keys,
            logit=relative_bias,
            mask=every_period,
            state=own_sink,
            output=gated,
        ),
        tensors=("scale", "bias", ("period", "int32"), "sink", "gate"),
        scalars=("half", "factor"),
        args=dict(
            scale=SCALE, bias=BIAS, period=PERIOD, sink=SINK, gate=GATE, half=0.5, factor=0.75
        ),
    ),
}


def reference(case, **built_in):
    return Variant(**case.reference, **built_in)
