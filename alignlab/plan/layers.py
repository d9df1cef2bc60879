"""What each layer of a model computes and keeps, as tapes: transformers' modelling code in bytes; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from alignlab.plan.shapes import Linear, Shape
from alignlab.plan.tape import Tape, Tensor

FLOAT32 = 4
TILE_TOKENS, TILE_WORDS = 4096, 32768  # TRL 1.16's fused LM head (trl.kernels.chunked_logprob, trl.trainer.utils)


@dataclass(frozen=True)
class Way:
    """How a model computes: bytes of its numbers, what is trained, and on what device."""

    cuda: bool
    compute: int  # bytes of a number in matrix products
    stored: int  # bytes of a number in weights that are not 4-bit, and in the hidden states between layers
    in_4bit: bool
    rank: int  # of the adapter; 0 where all weights are trained
    adapted: frozenset[str]  # linear maps with an adapter
    lora_dropout: float
    dropout: float  # the model's own
    cached: bool = False  # autocast's narrow copies of trained weights are there already, and counted elsewhere

    @property
    def mixed(self) -> bool:
        """Autocast: matrix products in fewer bytes than trained weights have."""
        return self.compute < FLOAT32

    @property
    def widens(self) -> bool:
        """Autocast computes powers and LayerNorm in float32 on a GPU, not on a CPU."""
        return self.mixed and self.cuda

    @property
    def full(self) -> bool:
        return not self.rank


@dataclass(frozen=True)
class Batch:
    sequences: int
    length: int  # tokens to a sequence, padding included
    scored: int  # tokens whose log-probability is asked for

    @property
    def positions(self) -> int:
        return self.sequences * self.length


def layer(shape: Shape, way: Way, batch: Batch) -> tuple[Tape, Tensor, Tensor]:
    """One layer's tape with its input and result."""
    tape = Tape()
    hidden = tape.tensor(batch.positions * shape.hidden * way.stored)
    build = _gpt2_layer if shape.family == "gpt2" else _gated_layer
    return tape, hidden, build(_Builder(tape, shape, way, batch), hidden)


def head(shape: Shape, way: Way, batch: Batch) -> tuple[Tape, Tensor, Tensor]:
    """The final norm and TRL's fused LM head: log-probabilities without a (positions × vocabulary) matrix."""
    tape = Tape()
    hidden = tape.tensor(batch.positions * shape.hidden * way.stored)
    b = _Builder(tape, shape, way, batch)
    normed = b.layer_norm(hidden) if shape.family == "gpt2" else b.rms_norm(hidden)
    width = tape.sizes[normed] / batch.positions
    scored = batch.scored if way.cuda else batch.sequences * (batch.length - 1)  # without Triton every position is
    chosen = tape.op(scored * width, normed, back=tape.sizes[normed])
    tape.hold(normed)
    tile = min(scored, TILE_TOKENS) * TILE_WORDS * way.compute
    chunk = shape.hidden * min(shape.vocabulary, TILE_WORDS) * way.compute if way.stored > way.compute else 0
    chunk += min(scored, TILE_TOKENS) * shape.hidden * way.compute if width > way.compute else 0
    forward, backward = (0, 0) if way.cuda else _folded_in_torch(min(scored, TILE_TOKENS), shape.vocabulary)
    weights = (tape.weight(shape.vocabulary * shape.hidden * FLOAT32),) if way.full else ()
    widened = scored * shape.hidden * FLOAT32 if width < FLOAT32 else 0  # the gradient is gathered in float32
    result = tape.op(
        scored * 13,  # log-probability, entropy, mean logit, whether it is the first choice
        chosen,
        *weights,
        saves=(chosen,),
        extra=scored * 16,
        temp=tile + chunk + forward + scored * 28,
        back=tile + chunk + backward + widened,
    )
    return tape, hidden, result


def _folded_in_torch(tokens: int, words: int) -> tuple[float, float]:
    """The float32 tiles that TRL's fold takes where there is no Triton: forward and backward."""
    tile = tokens * min(words, TILE_WORDS) * FLOAT32
    return 3.25 * tile, 7.25 * tile


def logits(shape: Shape, way: Way, rows: int) -> float:
    """Bytes of logits in the compute dtype, which accelerate then widens to float32."""
    return rows * shape.vocabulary * (FLOAT32 + (way.compute if way.mixed else 0))


@dataclass(frozen=True)
class _Builder:
    tape: Tape
    shape: Shape
    way: Way
    batch: Batch

    def sized(self, features: float, width: int) -> float:
        return self.batch.positions * features * width

    def cast(self, x: Tensor, features: int, width: int) -> Tensor:
        """x in numbers of `width` bytes; x itself where it has them."""
        size = self.sized(features, width)
        return x if self.tape.sizes[x] == size else self.tape.op(size, x)

    def linear(self, x: Tensor, of: Linear) -> Tensor:
        """A linear map: 4-bit weights are unpacked for the moment, trained ones copied to the compute dtype."""
        tape, way = self.tape, self.way
        size = self.sized(of.outputs, way.compute)
        unpacked = of.weights * (way.compute + FLOAT32 / 64) if way.in_4bit else 0
        narrow = self.cast(x, of.inputs, way.compute)
        weights = self.trained(of.weights) if way.full else ()
        kept = (narrow, *weights) if way.full else ()
        out = tape.op(size, narrow, *weights, saves=kept, temp=unpacked, back=unpacked)
        if of.name not in way.adapted:
            return out
        return self._adapted(x, tape.op(size, out) if way.in_4bit else out, of)

    def _adapted(self, x: Tensor, out: Tensor, of: Linear) -> Tensor:
        """PEFT's LoRA on a linear map: out + B(A(dropout(x))) · scaling.

        PEFT widens x to the adapter's float32 first, but for 4-bit layers under autocast, which it sees on a GPU only.
        """
        tape, way = self.tape, self.way
        wide = x if way.in_4bit and way.cuda else self.cast(x, of.inputs, FLOAT32)
        dropped = self.dropped(wide, of.inputs, way.lora_dropout)
        narrow = self.cast(dropped, of.inputs, way.compute)
        factor_a, factor_b = (self.trained(way.rank * features) for features in (of.inputs, of.outputs))
        inner = tape.op(self.sized(way.rank, way.compute), narrow, *factor_a, saves=(narrow, *factor_a))
        outer = tape.op(self.sized(of.outputs, way.compute), inner, *factor_b, saves=(inner, *factor_b))
        scaled = tape.op(self.sized(of.outputs, way.compute), outer)
        total = tape.op(self.sized(of.outputs, way.compute), out, scaled, passes=True)
        tape.hold(wide, x)
        return total

    def trained(self, weights: int) -> tuple[Tensor, ...]:
        """Float32 weights as a matrix product reads them: under autocast a narrow copy, which its backward needs."""
        of = self.tape.weight(weights * FLOAT32)
        if not self.way.mixed:
            return (of,)
        return (self.tape.op(0 if self.way.cached else weights * self.way.compute, of),)

    def dropped(self, x: Tensor, features: int, rate: float) -> Tensor:
        """Dropout keeps a mask: a byte a number on a GPU, a number of its own on a CPU."""
        if not rate:
            return x
        size = self.tape.sizes[x]
        mask = self.batch.positions * features if self.way.cuda else size
        return self.tape.op(size, x, extra=mask)

    def rms_norm(self, x: Tensor) -> Tensor:
        """x · (mean(x²) + ε)^-½ in float32, then narrowed and scaled by the weights (LlamaRMSNorm)."""
        tape, way, h = self.tape, self.way, self.shape.hidden
        full = self.sized(h, FLOAT32)
        wide = self.cast(x, h, FLOAT32)
        square = tape.op(full, wide, saves=(wide,), back=2 * full)
        rate = tape.op(self.sized(1, FLOAT32), square, saves_out=True, back=full)
        normed = tape.op(full, wide, rate, saves=(wide,), back=full)
        tape.hold(wide, rate)
        narrow = self.cast(normed, h, way.stored)
        return self._scaled(self.sized(h, way.stored), narrow, back=full)

    def _scaled(self, size: float, x: Tensor, *, back: float = 0, extra: float = 0, keeps: bool = False) -> Tensor:
        """A norm's multiplication by its weights, for whose gradient its input stays."""
        weights = (self.tape.weight(self.shape.hidden * FLOAT32),) if self.way.full else ()
        saves = (x,) if weights or keeps else ()
        return self.tape.op(size, x, *weights, saves=saves, extra=extra, back=back if weights else 0)

    def layer_norm(self, x: Tensor) -> Tensor:
        """torch's LayerNorm, which autocast widens to float32."""
        h = self.shape.hidden
        wide = self.cast(x, h, FLOAT32) if self.way.widens else x
        size = self.tape.sizes[wide]
        return self._scaled(size, wide, extra=self.sized(2, FLOAT32), keeps=True)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, back: float = 0) -> Tensor:
        """Scaled dot-product attention without the matrix of scores: a mask, q, k, v, the result and its sums stay."""
        size = self.sized(self.shape.heads * self.shape.head_size, self.way.compute)
        sums = self.sized(self.shape.heads, FLOAT32)
        mask = self.batch.sequences * self.batch.length**2 * self.way.compute
        kept = tuple(dict.fromkeys((q, k, v)))
        scores = 0  # dropout on a CPU leaves no kernel but the one that makes the matrix of scores
        if self.way.dropout and not self.way.cuda:
            scores = self.batch.sequences * self.shape.heads * self.batch.length**2 * self.way.compute
        kept_too = sums + mask + 3 * scores
        return self.tape.op(
            size, *kept, saves=kept, saves_out=True, extra=kept_too, temp=2 * scores, back=back + sums + 2 * scores
        )


def _gated_layer(b: _Builder, hidden: Tensor) -> Tensor:
    """LlamaDecoderLayer and its kin: norm, attention with rotary positions, norm, gated MLP."""
    tape, way, shape = b.tape, b.way, b.shape
    q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj = shape.linears
    normed = b.rms_norm(hidden)
    q, k, v = (b.linear(normed, of) for of in (q_proj, k_proj, v_proj))
    turned_q, turned_k = (_rotated(b, x, of.outputs) for x, of in ((q, q_proj), (k, k_proj)))
    tape.hold(q, k)
    repeated = [turned_k, v]
    if shape.kv_heads < shape.heads:  # repeat_kv, which a mask makes necessary
        wide = max(way.compute, way.stored)
        repeated = [tape.op(b.sized(q_proj.outputs, w), x) for x, w in ((turned_k, wide), (v, way.compute))]
    keys = [b.cast(x, q_proj.outputs, way.compute) for x in (turned_q, repeated[0])]
    mixed = b.attend(*keys, repeated[1])
    tape.hold(turned_q, turned_k, v)
    out = b.linear(mixed, o_proj)
    tape.hold(normed)
    middle = _residual(b, hidden, out)
    normed = b.rms_norm(middle)
    gate = b.linear(normed, gate_proj)
    active = tape.op(tape.sizes[gate], gate, saves=(gate,))
    up = b.linear(normed, up_proj)
    product = tape.op(tape.sizes[gate], active, up, saves=(active, up))
    down = b.linear(product, down_proj)
    tape.hold(normed)
    total = _residual(b, middle, down)
    tape.hold(hidden)
    return total


def _residual(b: _Builder, stream: Tensor, addition: Tensor) -> Tensor:
    """The sum has the wider of the two dtypes; a narrower addition's gradient is narrowed again."""
    same = b.tape.sizes[stream] == b.tape.sizes[addition]
    return b.tape.op(b.tape.sizes[stream], stream, addition if same else _widened(b, addition), passes=True)


def _widened(b: _Builder, x: Tensor) -> Tensor:
    """Stands for the conversion inside an addition: nothing forward, a narrow gradient backward."""
    return b.tape.op(0, x)


def _rotated(b: _Builder, x: Tensor, features: int) -> Tensor:
    """x·cos + rotate_half(x)·sin; cos and sin have the dtype of the hidden states."""
    tape, way = b.tape, b.way
    size, wide = tape.sizes[x], b.sized(features, max(way.compute, way.stored))
    one = tape.op(wide, x)
    half = tape.op(size, x, temp=size / 2, back=size)
    other = tape.op(wide, half)
    return tape.op(wide, one, other, passes=True)


def _gpt2_layer(b: _Builder, hidden: Tensor) -> Tensor:
    """GPT2Block: LayerNorm, attention, LayerNorm, an MLP with the tanh form of GELU, and dropout where it is on."""
    tape, way, shape = b.tape, b.way, b.shape
    c_attn, c_proj, c_fc, mlp_proj = shape.linears
    normed = b.layer_norm(hidden)
    qkv = b.linear(normed, c_attn)
    mixed = b.attend(qkv, qkv, qkv, back=tape.sizes[qkv])
    tape.hold(qkv)
    out = b.dropped(b.linear(mixed, c_proj), shape.hidden, way.dropout)
    tape.hold(normed)
    middle = _residual(b, hidden, out)
    normed = b.layer_norm(middle)
    active = _gelu(b, b.linear(normed, c_fc))
    down = b.dropped(b.linear(active, mlp_proj), shape.hidden, way.dropout)
    tape.hold(normed)
    total = _residual(b, middle, down)
    tape.hold(out, hidden)
    return total


def _gelu(b: _Builder, x: Tensor) -> Tensor:
    """NewGELUActivation, operation by operation: 0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))); autocast widens x³."""
    tape = b.tape
    half = tape.op(tape.sizes[x], x)
    base = b.cast(x, b.shape.intermediate, FLOAT32) if b.way.widens else x
    wide = tape.sizes[base]
    cube = tape.op(wide, base, saves=(base,), back=2 * wide)
    scaled = tape.op(wide, cube)
    inner = tape.op(wide, scaled, x, passes=True)
    inner = tape.op(wide, inner)
    bent = tape.op(wide, inner, saves_out=True)
    one = tape.op(wide, bent, passes=True)
    out = tape.op(wide, half, one, saves=(half, one))
    tape.hold(x)
    return out
