// SwiGLU and the quantize behind it, and where CACHED its inputs in the format that backward reads; fp8c/ops/swiglu.py says
// what is computed.
//
// Legend: R rows, F features. A tile is 8 rows by 128 features. A warp takes one tile after another, each lane 4 rows by 8
//   features of it; while it computes, the next tile's inputs are on their way to shared memory, where the lane that asked for
//   them alone reads them. 16 lanes share the scales of 4 rows: each is made by one lane or two, because it costs some twenty
//   instructions, and the others fetch its reciprocal.

#include "config.cuh"
#include "numerics.cuh"

struct Arguments {
    const uint16 *gate, *up;
    const float* weight;  // of each row, where WEIGHTED
    uint8* q;
    void* s;
    uint8* c;
    void* cs;
    int64 s_row, s_col, cs_row, cs_col;
    int gate_row, up_row, q_row, c_row;
    int R, F;
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES_OF_HOST, "host and kernel disagree on the arguments");

DEVICE uint32 swiglu(uint32 gate, uint32 up, float weight) {
    const float g0 = first_of(gate), g1 = second_of(gate);
    const uint32 product = times(rounded(__fmul_rn(g0, sigmoid(g0)), __fmul_rn(g1, sigmoid(g1))), up);
    if constexpr (!WEIGHTED) return product;
    return rounded(__fmul_rn(first_of(product), weight), __fmul_rn(second_of(product), weight));
}

struct Shared {
    uint4 gate[STAGES][4][THREADS], up[STAGES][4][THREADS];
};
static_assert(sizeof(Shared) == SHARED_BYTES_OF_HOST, "config and kernel disagree on the layout of shared memory");

// Where a lane is: the first of its rows, none of which exist past the last tile, and its column. `index` is the block's first tile.
struct Place {
    int row, col, tile;
};
DEVICE Place place_of(const Arguments& a, int index) {
    const int own = index + threadIdx.x / 32, tiles = a.F / 128, lane = threadIdx.x % 32, band = own / tiles, tile = own - band * tiles;
    return {band * 8 + lane / 16 * 4, tile * 128 + lane % 16 * 8, tile};
}

DEVICE void fetch(Shared& shared, const Arguments& a, int stage, int index) {
    const Place at = place_of(a, index);
    const uint16* gate = a.gate + static_cast<int64>(at.row) * a.gate_row + at.col;
    const uint16* up = a.up + static_cast<int64>(at.row) * a.up_row + at.col;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        copy_async<16>(&shared.gate[stage][i][threadIdx.x], gate + i * a.gate_row, at.row + i < a.R);
        copy_async<16>(&shared.up[stage][i][threadIdx.x], up + i * a.up_row, at.row + i < a.R);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) fp8c_swiglu_forward(const __grid_constant__ Arguments a) {
    extern __shared__ __align__(16) char memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory);
    const int thread = threadIdx.x, lane = thread % 32, tiles = a.F / 128;
    const int count = (a.R + 7) / 8 * tiles, step = gridDim.x * (THREADS / 32);
    const bool bit8 = lane & 8, bit4 = lane & 4, bit2 = lane & 2;
    const int own = (bit8 ? 2 : 0) + (bit4 ? 1 : 0);  // the row whose scales this lane makes
    int ahead = blockIdx.x * (THREADS / 32), stage = 0;  // the same in all warps of a block: `fetch` adds the warp's own
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++, ahead += step) {
        fetch(shared, a, i, ahead);
        close_copies();
    }
    for (int index = blockIdx.x * (THREADS / 32); index < count; index += step, ahead += step) {
        fetch(shared, a, stage == 0 ? STAGES - 1 : stage - 1, ahead);
        close_copies();
        const Place at = place_of(a, index);
        const int rows = a.R - at.row;
        float weight[4] = {};
        if constexpr (WEIGHTED) {
#pragma unroll
            for (int i = 0; i < 4; i++)
                if (i < rows) weight[i] = a.weight[at.row + i];
        }
        wait_for_copies_but<STAGES - 1>();
        const uint4(&gates)[4][THREADS] = shared.gate[stage], (&ups)[4][THREADS] = shared.up[stage];
        stage = stage == STAGES - 1 ? 0 : stage + 1;
        uint4 h[4];
        uint32 both[4];  // amax of gate and up
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const uint4 gate = gates[i][thread], up = ups[i][thread];
            h[i] = {swiglu(gate.x, up.x, weight[i]), swiglu(gate.y, up.y, weight[i]), swiglu(gate.z, up.z, weight[i]),
                    swiglu(gate.w, up.w, weight[i])};
            if constexpr (CACHED) both[i] = side_by_side(larger_of(gate), larger_of(up));
        }
        {
            const uint32 rows01 = side_by_side(larger_of(h[0]), larger_of(h[1])), rows23 = side_by_side(larger_of(h[2]), larger_of(h[3]));
            uint32 amax = reduce_larger(exchange_larger(rows01, rows23, 8, bit8), 4);
            amax = reduce_larger(reduce_larger(amax, 2), 1);
            const float scale = scale_of<ELEMENT, KIND>(bit4 ? second_of(amax) : first_of(amax));
            const Reciprocal r = reciprocal<KIND>(scale);
            if (lane % 4 == 0 && own < rows) store_scale<KIND>(a.s, (at.row + own) * a.s_row + at.tile * a.s_col, scale);
            uint8* q = a.q + static_cast<int64>(at.row) * a.q_row + at.col;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint2 codes = codes_of<ELEMENT, KIND>(h[i], reciprocal_of_lane<KIND>(r, i * 4));
                if (i < rows) *reinterpret_cast<uint2*>(q + i * a.q_row) = codes;
            }
        }
        if constexpr (CACHED) {
            uint32 amax = exchange_larger(exchange_larger(both[0], both[2], 8, bit8), exchange_larger(both[1], both[3], 8, bit8), 4, bit4);
            amax = reduce_larger(reduce_larger(amax, 2), 1);
            const float scale = scale_of<ELEMENT_C, KIND_C>(bit2 ? second_of(amax) : first_of(amax));
            const Reciprocal r = reciprocal<KIND_C>(scale);
            if (lane % 2 == 0 && own < rows)
                store_scale<KIND_C>(a.cs, (at.row + own) * a.cs_row + (at.tile + (bit2 ? tiles : 0)) * a.cs_col, scale);
            uint8* c = a.c + static_cast<int64>(at.row) * a.c_row + at.col;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint4 gate = read_again(gates[i][thread]), up = read_again(ups[i][thread]);
                const uint2 gate_codes = codes_of<ELEMENT_C, KIND_C>(gate, reciprocal_of_lane<KIND_C>(r, i * 4));
                const uint2 up_codes = codes_of<ELEMENT_C, KIND_C>(up, reciprocal_of_lane<KIND_C>(r, i * 4 + 2));
                if (i < rows) {
                    *reinterpret_cast<uint2*>(c + i * a.c_row) = gate_codes;
                    *reinterpret_cast<uint2*>(c + i * a.c_row + a.F) = up_codes;
                }
            }
        }
    }
}
