// SwiGLU and the quantizes around it from one read: the (weighted) product along rows, and gate and up for backward.
// fp8c/ops/swiglu.py says what is computed.
//
// Legend: R rows, F features. Half a warp has 128 features of ROWS rows, a lane 8 of them, which stay in registers until the
//   scales of all rows are known. Maxima are exchanged between lanes so that each lane makes one scale, or two the same.

#include "config.cuh"
#include "factors.cuh"
#include "numerics.cuh"

struct Arguments {
    const uint16 *gate, *up;
    const float* weight;  // of each row, where WEIGHTED
    uint8* q;
    void* s;
    uint8* c;  // [R, 2F], gate in its first F columns
    void* cs;
    int64 gate_row, up_row, q_row, s_row, s_col, c_row, cs_row, cs_col;
    int R, F;
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES_OF_HOST, "host and kernel disagree on the arguments");

constexpr int ROWS = 4;
constexpr int WORDS = ROWS + ROWS / 2;  // each has two maxima: of gate and up of a row, of two rows of h

// The lane of 16, but for bits that don't matter, that makes a scale: of the first or second maximum of a word.
DEVICE constexpr int maker_of(int word, int second) {
    return (word < 3 ? 0 : 8) + (word % 3 == 1 ? 4 : word % 3 == 2 ? 2 : 0) + second;
}

DEVICE uint32 product_of(uint32 gate, uint32 up) {
    const float g0 = first_of(gate), g1 = second_of(gate);
    return times(rounded(__fmul_rn(g0, sigmoid(g0)), __fmul_rn(g1, sigmoid(g1))), up);
}
DEVICE uint32 weighted(uint32 pair, float weight) {
    return rounded(__fmul_rn(first_of(pair), weight), __fmul_rn(second_of(pair), weight));
}

template <int ELEMENT_R, int KIND_R>
DEVICE void make(float amax, float& scale, Divisor& divisor) {
    scale = scale_of<ELEMENT_R, KIND_R>(amax), divisor = divisor_of<ELEMENT_R, KIND_R>(amax, scale);
}

template <int ELEMENT_R, int KIND_R, bool BOTH>
DEVICE void store_codes(uint8* to, const uint4& x, const Divisor& divisor, int maker, bool exists) {
    const float factor = __shfl_sync(ALL_LANES, divisor.factor, maker, 16);
    const float low = BOTH ? __shfl_sync(ALL_LANES, divisor.low, maker, 16) : 0.0f;
    store_if(exists, to, codes_by<ELEMENT_R, KIND_R, BOTH>(x, factor, low));
}

template <bool BOTH>
DEVICE void store_rows(const Arguments& a, const uint4 (&gate)[ROWS], const uint4 (&up)[ROWS], const uint4 (&h)[ROWS],
                       const Divisor& divisor, int row, int column) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const bool exists = row + r < a.R;
        uint8* c = a.c + (row + r) * a.c_row + column;
        store_codes<ELEMENT_C, KIND_C, BOTH>(c, gate[r], divisor, maker_of(r, 0), exists);
        store_codes<ELEMENT_C, KIND_C, BOTH>(c + a.F, up[r], divisor, maker_of(r, 1), exists);
        store_codes<ELEMENT, KIND, BOTH>(a.q + (row + r) * a.q_row + column, h[r], divisor, maker_of(ROWS + r / 2, r % 2), exists);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) fp8c_swiglu_forward(const __grid_constant__ Arguments a) {
    const int tiles = a.F / 128, part = blockIdx.x * (THREADS / 16) + threadIdx.x / 16;
    const int row = part / tiles * ROWS, tile = part % tiles, lane = threadIdx.x % 16, column = tile * 128 + lane * 8;
    uint4 gate[ROWS], up[ROWS], h[ROWS];
    float weight[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        gate[r] = up[r] = {};
        weight[r] = 0.0f;
        if (row + r < a.R) {
            gate[r] = __ldg(reinterpret_cast<const uint4*>(a.gate + (row + r) * a.gate_row + column));
            up[r] = __ldg(reinterpret_cast<const uint4*>(a.up + (row + r) * a.up_row + column));
            if constexpr (WEIGHTED) weight[r] = __ldg(a.weight + row + r);
        }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        h[r] = {product_of(gate[r].x, up[r].x), product_of(gate[r].y, up[r].y), product_of(gate[r].z, up[r].z), product_of(gate[r].w, up[r].w)};
        if constexpr (WEIGHTED)
            h[r] = {weighted(h[r].x, weight[r]), weighted(h[r].y, weight[r]), weighted(h[r].z, weight[r]), weighted(h[r].w, weight[r])};
    }
    uint32 amax[WORDS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) amax[r] = side_by_side(larger_of(gate[r]), larger_of(up[r]));
#pragma unroll
    for (int i = 0; i < ROWS / 2; i++) amax[ROWS + i] = side_by_side(larger_of(h[2 * i]), larger_of(h[2 * i + 1]));
    const bool bit8 = lane & 8, bit4 = lane & 4, bit2 = lane & 2, bit1 = lane & 1;
#pragma unroll
    for (int i = 0; i < WORDS / 2; i++) amax[i] = exchange_larger(amax[i], amax[i + WORDS / 2], 8, bit8);
    const uint32 one = exchange_larger(amax[0], amax[1], 4, bit4), other = reduce_larger(amax[2], 4);
    const uint32 pair = reduce_larger(exchange_larger(one, other, 2, bit2), 1);
    const int word = (bit8 ? 3 : 0) + (bit2 ? 2 : bit4 ? 1 : 0);
    const bool is_first = !(bit2 && bit4);  // of the lanes that make the same scale
    const float most = bit1 ? second_of(pair) : first_of(pair);
    const bool is_h = word >= ROWS;
    const int own = row + (is_h ? 2 * (word - ROWS) + bit1 : word);
    float scale;
    Divisor divisor;
    if (is_h || (ELEMENT == ELEMENT_C && KIND == KIND_C))
        make<ELEMENT, KIND>(most, scale, divisor);
    else
        make<ELEMENT_C, KIND_C>(most, scale, divisor);
    if (is_first && own < a.R) {
        if (is_h)
            store_scale<KIND>(a.s, own * a.s_row + tile * a.s_col, scale);
        else
            store_scale<KIND_C>(a.cs, own * a.cs_row + (tile + (bit1 ? tiles : 0)) * a.cs_col, scale);
    }
    if ((KIND == FP32 || KIND_C == FP32) && __any_sync(ALL_LANES, divisor.takes_both))
        store_rows<true>(a, gate, up, h, divisor, row, column);
    else
        store_rows<false>(a, gate, up, h, divisor, row, column);
}
