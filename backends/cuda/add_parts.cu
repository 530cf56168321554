// The gradient of the router's weight, behind swiglu_backward.cu: parts of each row, added up in order. A thread has a row.
#include "config.cuh"
#include "ptx.cuh"

struct Arguments {
    const float* parts;  // [P, R]
    float* total;        // [R]
    int P, R;
};
static_assert(sizeof(Arguments) == ARGUMENT_BYTES_OF_HOST, "host and kernel disagree on the arguments");

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) fp8c_add_parts(const __grid_constant__ Arguments a) {
    const int row = blockIdx.x * THREADS + threadIdx.x;
    if (row >= a.R) return;
    float total = 0.0f;
#pragma unroll 8
    for (int i = 0; i < a.P; i++) total += __ldg(a.parts + static_cast<long long>(i) * a.R + row);
    a.total[row] = total;
}
