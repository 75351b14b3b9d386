"""A machine that is just as a CostModel says, in place of a raddle.blend.rig.Rig."""

from dataclasses import replace

from raddle.blend import measure
from raddle.blend.shape import Shape, with_layers


class FakeRig:
    """Of some layers of a model. alphas: by (max_ctas, max_sms), of 132. bumps: by tokens,
    how much longer GEMMs take than on a convex line. noise: called for a factor of each time."""

    def __init__(self, content, layers=4, alphas=None, bumps=None, noise=None):
        shape = Shape.from_dict(with_layers(content, 1))
        self.num_layers = layers
        self.read_rate, self.flops_rate = 4.4e12, 400e12
        self.kv_bytes, self.score_flops = shape.kv_bytes, 4.0 * shape.num_qo_heads * shape.head_dim
        self.start, self.host = 5e-6, 2e-4  # of decode attention, a layer; of a step
        self.alphas = alphas or {(66, 0): 0.9, (66, 66): 0.4, (132, 0): 0.7}
        self.bumps, self.noise = bumps or {}, noise or (lambda: 1.0)
        two = Shape.from_dict(with_layers(content, 2))
        self.layer_bytes = (two.parameters - shape.parameters) * shape.dtype_bytes
        self.end_bytes = (shape.parameters * shape.dtype_bytes) - self.layer_bytes

    def layer(self, tokens):
        """Convex: the weights' read at a worse rate than K and V's, then a line."""
        return max(1.1 * self.layer_bytes / self.read_rate, tokens * 1.3e-6)

    def ends(self, tokens):
        return 1.2 * self.end_bytes / self.read_rate + tokens * 1e-8

    def gemms(self, tokens, layers):
        return self.ends(tokens) + layers * self.layer(tokens)

    def pass_seconds(self, tokens):
        factor = self.bumps.get(tokens, 1.0)
        return tuple(factor * self.noise() * self.gemms(tokens, n) for n in (1, self.num_layers))

    def reads(self, batch, kv_len):
        return self.num_layers * (self.start + batch * kv_len * self.kv_bytes / self.read_rate)

    def decode_seconds(self, batch, kv_len):
        return self.noise() * self.reads(batch, kv_len)

    def prefill(self, chunk):
        return self.num_layers * chunk.scores * self.score_flops / self.flops_rate

    def prefill_seconds(self, chunk):
        return self.noise() * self.prefill(chunk)

    def num_ctas(self):
        return 132

    def num_sms(self):
        return 132

    def beside_seconds(self, tokens, batch, kv_len, counts, max_ctas, max_sms):
        gemms = counts[0] * self.gemms(tokens, self.num_layers)
        reads = counts[1] * self.reads(batch, kv_len)
        all_bytes = self.end_bytes + self.num_layers * self.layer_bytes
        weights = counts[0] * all_bytes / self.read_rate
        longer, shorter = max(gemms - weights, reads), min(gemms - weights, reads)
        return self.noise() * (weights + longer + self.alphas[max_ctas, max_sms] * shorter)

    def step_seconds(self, batch, kv_len, chunks):
        tokens = batch + sum(chunk.count for chunk in chunks)
        seconds = self.gemms(tokens, self.num_layers) + self.reads(batch, kv_len + 1)
        seconds += sum(self.prefill(chunk) for chunk in chunks) + self.host
        return self.noise() * seconds


GRID = replace(measure.GPU, shares=(1 / 2, 1.0))


def surveyed(content, fake, grid=GRID):
    return {"model": content, **measure.survey(fake, grid, lambda text: None)}
