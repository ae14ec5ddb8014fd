"""What one transformer block keeps for the backward pass, and needs while it is computed.

The arrays that a block saves follow from ``kernels/attention.py`` (q, k, v, out and one logarithm
per head, but no scores), ``elementwise.py`` (gated MLPs save their inputs) and ``adapters/lora.py``
(``add_product`` saves the input of the base layer). What other attention, other MLPs, experts and
recurrent layers save was read from mlx-lm's code and compared with how the peak of small models
grows with their number of blocks. ``block_shapes.py`` finds the sizes in a model.
"""

from dataclasses import dataclass

from ..device import Backend
from ..kernels.attention import CHUNK
from ..kernels.choices import fused_length
from ..kernels.window_attention import Blocks

# Arrays of the scores of a group of window blocks, in the type of the activations, on a GPU.
_WINDOW_ARRAYS = 11.5

# Arrays in the backward pass of experts: of their width, and of the width of the residual stream.
_EXPERT_ARRAYS = 5.0
_EXPERT_STREAMS = 6.0

# A recurrent layer's arrays: of its width in the backward pass, of its decays that are kept for the
# backward pass, and of its decays in it.
_MIXER_ARRAYS = 10.0
_DECAYS_KEPT = 2.55
_DECAYS = 4.5


@dataclass(frozen=True)
class Coefficients:
    """The number of arrays of each kind that MLX holds at once.

    They were measured on a CPU. A GPU fuses kernels, so all of them may differ there.

    Attributes:
        slices: Arrays of the size of one slice of the head's logits, if there are several slices. A
            single slice needs seven arrays.
        mlp: m, arrays of (T, intermediate) in an MLP's backward pass, without the saved arrays.
        mlp_again: m', further arrays of this shape if the MLP has just been recomputed.
        scores: s, float32 arrays of (rows, heads, 512, keys) for the last chunk of attention.
        scores_before: s', arrays of the chunk before it, whose memory has not been freed yet.
        stream: h, arrays of (T, hidden), both for an MLP and for attention.
    """

    slices: float = 10.1
    mlp: float = 12.0
    mlp_again: float = 2.5
    scores: float = 7.4
    scores_before: float = 5.9
    stream: float = 3.0


@dataclass(frozen=True)
class BatchShape:
    """The shape of a step's input, the bytes e per activation, and whether rows are packed.

    ``blocks`` is true if attention with a sliding window is computed in blocks, and other attention
    by MLX where it has a fused gradient on ``backend``. ``native_delta`` is true if MLX computes
    the gated delta rule.
    """

    rows: int
    length: int
    itemsize: int
    packed: bool = False
    blocks: bool = False
    native_delta: bool = False
    backend: Backend = "cpu"

    def of(self, elements: float) -> float:
        """Return the bytes of ``elements`` elements per token: T e elements."""
        return self.rows * self.length * self.itemsize * elements


@dataclass(frozen=True)
class Mixer:
    """A recurrent layer's sizes: a gated delta rule, or Mamba 2.

    Attributes:
        width: Elements per token in the widest of its arrays.
        piece: Tokens that are computed at a time. One state is kept for each piece.
        state: Elements in a recurrent state of a row.
        states: Arrays of a state for each token of a piece that the backward pass needs.
        adds_up: Whether all pieces except the first need these arrays at the same time, or one
            piece at a time.
        decay_heads: Heads with a decay between each two tokens of a piece, or 0.
    """

    width: int
    piece: int
    state: int
    states: float
    adds_up: bool
    decay_heads: int

    def saved(self, batch: BatchShape) -> float:
        """Return the bytes of the states and decays that are kept, in float32.

        4 rows pieces (state + 2.55 heads piece²)
        """
        pieces, tokens = self._pieces(batch)
        decays = _DECAYS_KEPT * self.decay_heads * tokens**2
        return 4 * batch.rows * pieces * (self.state + decays)

    def backward(self, batch: BatchShape) -> float:
        """Return the temporary bytes of its backward pass.

        T e 10 width + 4 rows (states piece state + 4.5 heads piece²), with (pieces - 1) states if
        these add up

        The delta rule computes a piece at a time, before the rest of the layer's backward pass, so
        only the larger of the two counts. MLX's own delta rule is counted without the states of a
        piece. It runs on a GPU only, and its memory was not measured.
        """
        pieces, tokens = self._pieces(batch)
        elements = _DECAYS * self.decay_heads * tokens**2
        is_native = batch.native_delta and not self.decay_heads
        if not is_native:
            times = pieces - 1 if self.adds_up else 1
            elements += times * self.states * tokens * self.state
        arrays, states = batch.of(_MIXER_ARRAYS * self.width), 4 * batch.rows * elements
        return arrays + states if self.decay_heads else max(arrays, states)

    def _pieces(self, batch: BatchShape) -> tuple[int, int]:
        """Return the number of pieces of a row, and the tokens of the largest."""
        return -(-batch.length // self.piece), min(batch.length, self.piece)


@dataclass(frozen=True)
class Block:
    """A transformer block's sizes, in elements per token unless stated otherwise.

    Attributes:
        hidden: H, the width of the residual stream.
        norms: Number of normalizations over H elements. Each saves its input.
        heads: Query heads.
        queries: Q, heads · head_dim.
        keys: K, key heads · head_dim; the values have the same size.
        kept_twice: Whether queries and keys are saved twice: before and after normalization, or
            joined with the values and separately.
        window: Largest number of keys that a query sees, or None for all.
        whole_scores: Arrays of all scores that attention keeps, and that its gradient needs: 0 for
            ours.
        mlp: F, the intermediate size of the gated MLPs; 0 if there are none.
        joined: F of the MLPs among them that do not have our gradient, because gate and up come
            from one layer, or have other names.
        experts: F of the experts' gated MLPs times the number of experts per token.
        expert_arrays: Arrays of this size that their activation keeps.
        routed: Number of experts per token.
        widest: Elements that the linear layer with the largest output returns, for all experts of a
            token.
        products: Multiplications per token in the linear layers, with only the experts that the
            token uses.
        inputs: Elements that adapters save from the inputs of layers.
        outputs: Elements saved from the outputs of layers, both by adapters and for layers outside
            attention and MLPs.
        mixer: The recurrent layer, or None.
    """

    hidden: int
    norms: int
    heads: int
    queries: int
    keys: int
    kept_twice: bool
    window: int | None
    whole_scores: tuple[float, float]
    mlp: int
    joined: int
    experts: int
    expert_arrays: int
    routed: int
    widest: int
    products: int
    inputs: int
    outputs: int
    mixer: Mixer | None = None

    def mlp_kept(self) -> int:
        """Return the elements per token that MLPs save: gate and up, 2F.

        Joined MLPs also save the sigmoid and the gate, 2F. Experts save what their activation
        needs, and their sorted inputs and outputs.
        """
        kept = 2 * self.mlp + 2 * self.joined
        if self.experts:
            kept += self.expert_arrays * self.experts + 2 * self.routed * self.hidden
        return kept

    def kept(self, batch: BatchShape) -> int:
        """Return the bytes that the block saves for the backward pass.

        T e (norms H + attention + MLP + adapters' part) + 4 T heads. Attention saves q, k, v and
        out: 2Q + 2K. With ``kept_twice``, it saves q and k again: + Q + K. Where it keeps its
        scores, each array of scores takes e rows heads length², and the 4 T heads are not needed.
        The padding of attention is added.
        """
        attention = (3 if self.kept_twice else 2) * (self.queries + self.keys)
        elements = (
            self.norms * self.hidden + attention + self.mlp_kept() + self.inputs + self.outputs
        )
        scores = 4 * batch.rows * batch.length * self.heads
        if any(self.whole_scores):
            scores = self.whole_scores[0] * self._whole_scores(batch)
        states = self.mixer.saved(batch) if self.mixer else 0
        return int(batch.of(elements) + scores + states + self._padding(batch))

    def fused(self, batch: BatchShape) -> int | None:
        """Return the length of MLX's fused attention, with its padding; None if it is not used."""
        is_windowed = self.window is not None and self.window < batch.length
        if not batch.blocks or batch.packed or is_windowed or any(self.whole_scores):
            return None
        width = self.queries // self.heads if self.heads else 0
        return fused_length(batch.length, (width, width), batch.itemsize, batch.backend)

    def _padding(self, batch: BatchShape) -> int:
        """Return the bytes that attention saves because its rows are padded, on CUDA.

        rows (padding (e (2Q + 2K) + 4 heads) + e length Q). MLX keeps its padded output, so the
        output without the padding, which the next layer keeps, is a copy.
        """
        padding = (self.fused(batch) or batch.length) - batch.length
        if not padding:
            return 0
        of_token = batch.itemsize * 2 * (self.queries + self.keys) + 4 * self.heads
        copied = batch.itemsize * batch.length * self.queries
        return batch.rows * (padding * of_token + copied)

    def _whole_scores(self, batch: BatchShape) -> int:
        """Return the bytes of the scores of all queries and keys: e rows heads length²."""
        return batch.itemsize * batch.rows * self.heads * batch.length**2

    def seen(self, length: int, back: int) -> int:
        """Return queries · keys of one row, for the chunk ``back`` chunks before the last one.

        A chunk of 512 queries sees all keys up to its end. With a window, it sees only the keys
        from the first chunk of the window on.
        """
        start = (length - 1) // CHUNK * CHUNK - back * CHUNK
        if start < 0:
            return 0
        stop = min(start + CHUNK, length)
        first = 0 if self.window is None else max(0, start - self.window + 1) // CHUNK * CHUNK
        return (stop - start) * (stop - first)

    def scores(self, batch: BatchShape, parts: Coefficients) -> float:
        """Return the bytes of attention's scores and masks: s S + s' S'.

        S = 4 rows heads queries keys of a chunk, and S' is the same for the chunk before it. The
        sum is that of the last chunk or that of the second last, whichever is larger. Packed rows
        need three masks (same example, earlier position, and both): 3 rows queries keys.

        Attention in blocks needs 11.5 e rows heads queries keys of a group of blocks instead, and
        attention that keeps its scores 4.3 to 6 e rows heads length².
        """
        if any(self.whole_scores):
            return self.whole_scores[1] * self._whole_scores(batch)
        if batch.blocks and self.window is not None and self.window < batch.length:
            blocks = Blocks(batch.rows, self.heads, self.heads, batch.length, self.window)
            masks = 3 * batch.rows * blocks.count * blocks.size * blocks.keys * batch.packed
            return _WINDOW_ARRAYS * blocks.group_bytes(batch.itemsize) + masks

        last, before, early = (
            4 * batch.rows * self.heads * self.seen(batch.length, back) for back in range(3)
        )
        both = max(
            parts.scores * last + parts.scores_before * before,
            parts.scores * before + parts.scores_before * early,
        )
        return both + (3 * batch.rows * self.seen(batch.length, 0) if batch.packed else 0)

    def experts_working(self, batch: BatchShape) -> float:
        """Return the temporary bytes of the experts: T e (5 F + 6 routed H)."""
        if not self.experts:
            return 0
        streams = _EXPERT_STREAMS * self.routed * self.hidden
        return batch.of(_EXPERT_ARRAYS * self.experts + streams)

    def largest_array(self, batch: BatchShape) -> int:
        """Return the elements in the largest array: T times a width, or the scores of attention."""
        width = max(self.hidden, self.widest)
        padded = self.fused(batch) or batch.length
        tokens = max(batch.length * width, padded * self.queries)
        return max(batch.rows * tokens, self._largest_scores(batch))

    def _largest_scores(self, batch: BatchShape) -> int:
        """Return the elements in the largest array of scores; 0 if MLX's attention keeps none.

        Attention in blocks bounds its arrays.
        """
        heads = batch.rows * self.heads
        if any(self.whole_scores):
            return heads * batch.length**2
        is_in_blocks = batch.blocks and self.window is not None and self.window < batch.length
        if is_in_blocks or self.fused(batch) is not None:
            return 0
        return heads * self.seen(batch.length, 0)

    def forward(self, batch: BatchShape, parts: Coefficients) -> int:
        """Return the temporary bytes of a forward pass that saves nothing.

        T e h H + max(T e m F, experts, s S + s' S', recurrent layer)
        """
        phases = (
            batch.of(parts.mlp * self.mlp),
            self.experts_working(batch),
            self.scores(batch, parts),
            self.mixer.backward(batch) if self.mixer else 0,
        )
        return int(batch.of(parts.stream * self.hidden) + max(phases))

    def backward(self, batch: BatchShape, parts: Coefficients, *, checkpoint: bool) -> int:
        """Return the temporary bytes of a block's backward pass: of its MLP or attention.

            T e h H + max(T e (m + m') F, experts, attention - T e (elements that the MLP saved))

        m' applies only with checkpointing. The MLP's activations are freed before the backward pass
        of attention, or of a recurrent layer.
        """
        arrays = parts.mlp + parts.mlp_again * checkpoint
        mlp = max(batch.of(arrays * self.mlp), self.experts_working(batch))
        mixer = self.mixer.backward(batch) if self.mixer else 0
        attention = max(self.scores(batch, parts), mixer) - batch.of(self.mlp_kept())
        return int(batch.of(parts.stream * self.hidden) + max(mlp, attention))
