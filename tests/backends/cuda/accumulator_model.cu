// The FP8 tensor core of Hopper, one output element a thread, bit for bit: the 32 products of an instruction and the
// running sum are aligned to the largest exponent, cut to 13 fraction bits toward zero, added exactly, and the result is
// cut to 13 fraction bits. Every 128 of K the sum is promoted: out = fma(sum, scale_a * scale_b, out).
// Compared with the device over nine kinds of input (tests/backends/cuda/test_gemm_gpu.py). NaN codes are not modelled.

struct Operand {
    const unsigned char* codes;  // E4M3, K innermost
    long long row;               // stride
    const float* scales;
    long long scale_row, scale_col;  // strides along rows / rows_per_scale and K / 128
    int rows_per_scale;
};

__device__ int exponent(int code) {  // of the significand in [0, 2) with three fraction bits; zero lies below everything
    const int e = code >> 3 & 15;
    return (code & 127) == 0 ? -60 : e ? e - 7 : -6;
}

__device__ int significand(int code) {
    const int e = code >> 3 & 15, m = code & 7, magnitude = e ? 8 + m : m;
    return code & 128 ? -magnitude : magnitude;
}

__device__ int shifted(int magnitude, int distance, bool negative) {
    const int cut = magnitude >> min(distance, 31);
    return negative ? -cut : cut;
}

__device__ float cut13(double x) {
    return static_cast<float>(__longlong_as_double(__double_as_longlong(x) & ~((1ll << 39) - 1)));
}

extern "C" __global__ void accumulator_model(Operand a, Operand b, float* out, long long out_row, int m, int n, int k,
                                             int promote) {
    const long long index = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
    if (index >= static_cast<long long>(m) * n) return;
    const int i = index / n, j = index % n;
    float total = 0, sum = 0;
    for (int k0 = 0, k1; k0 < k; k0 = k1) {
        k1 = min(k, k0 + 32);
        int top = sum != 0 ? (__float_as_int(sum) >> 23 & 255) - 127 : -127;
        for (int l = k0; l < k1; ++l)
            top = max(top, exponent(a.codes[i * a.row + l]) + exponent(b.codes[j * b.row + l]));
        int units = 0;  // of 2^(top - 13)
        for (int l = k0; l < k1; ++l) {
            const int x = a.codes[i * a.row + l], y = b.codes[j * b.row + l];
            const int product = significand(x) * significand(y);  // six fraction bits
            units += shifted(abs(product) << 7, top - exponent(x) - exponent(y), product < 0);
        }
        if (sum != 0) {
            const int bits = __float_as_int(sum);
            const int distance = top - ((bits >> 23 & 255) - 127);
            units += shifted(((bits & 0x7fffff) | 0x800000) >> 10, distance, bits < 0);
        }
        sum = cut13(ldexp(static_cast<double>(units), top - 13));
        if (promote && (k1 % 128 == 0 || k1 == k)) {
            const float scale = a.scales[i / a.rows_per_scale * a.scale_row + k0 / 128 * a.scale_col] *
                                b.scales[j / b.rows_per_scale * b.scale_row + k0 / 128 * b.scale_col];
            total = fmaf(sum, scale, total);
            sum = 0;
        }
    }
    out[i * out_row + j] = promote ? total : sum;
}
