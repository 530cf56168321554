/* Hopper's FP8 tensor-core accumulator, bit for bit, with promotion to FP32.
 *
 * One instruction adds 32 products to a running sum. An operand is significand * 2^(exponent - 3), so a product is
 * p * 2^(e - 6) with p = sa * sb and e = ea + eb; it is not normalized. All 33 terms are aligned to the largest
 * exponent, cut toward zero to 13 fraction bits and added exactly; the sum is cut toward zero to 13 fraction bits. After
 * every `interval` elements of K the sum times both scales is added to an FP32 register, and the sum starts again.
 *
 * M, N, K: rows of a, rows of b, reduction. K is a multiple of 32 and N of 32; G = ceil(K / interval).
 * A zero operand has an exponent below that of any product (fp8c: -60), so it never decides the alignment.
 *
 * Everything is in one function because a compiler lowers wide vectors before it inlines across targets.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define TERMS 32                  /* products of one instruction */
#define COLUMNS 32                /* columns of the result that one pass computes side by side */
#define FRACTION 13               /* fraction bits that survive the alignment */
#define PRODUCT_SHIFT 7           /* p has 6 fraction bits; 13 - 6. |p| << 7 is at most 225 * 128 and fits 15 bits */
#define FP32_CUT 0xfffffc00u      /* keeps 13 of FP32's 23 mantissa bits */

typedef int16_t lanes __attribute__((vector_size(2 * COLUMNS)));
typedef uint16_t unsigned_lanes __attribute__((vector_size(2 * COLUMNS)));
typedef int32_t wide_lanes __attribute__((vector_size(4 * COLUMNS)));

#if defined(FP8C_CLONES)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

/* out[m, n] for m in [m_begin, m_end). ea, sa [M, K]; eb, sb [K, N]; a_scale [M, G]; b_scale [G, N]; out [M, N]. */
CLONES void fp8c_hopper_gemm(const int16_t *ea, const int16_t *sa, const int16_t *eb, const int16_t *sb,
                             const float *a_scale, const float *b_scale, float *out, int64_t m_begin, int64_t m_end,
                             int64_t n_count, int64_t k_count, int64_t interval) {
    const int64_t groups = (k_count + interval - 1) / interval;
    for (int64_t n = 0; n < n_count; n += COLUMNS)
        for (int64_t m = m_begin; m < m_end; m++) {
            float promoted[COLUMNS] = {0};
            for (int64_t g = 0; g < groups; g++) {
                const int64_t end = (g + 1) * interval < k_count ? (g + 1) * interval : k_count;
                uint32_t sum[COLUMNS] = {0}; /* the running sums, as bits of FP32 */
                for (int64_t k = g * interval; k < end; k += TERMS) {
                    const int16_t *ek = ea + m * k_count + k, *sk = sa + m * k_count + k;
                    const int16_t *en = eb + k * n_count + n, *sn = sb + k * n_count + n;

                    int16_t top_of[COLUMNS];
                    for (int i = 0; i < COLUMNS; i++)
                        top_of[i] = sum[i] ? (int16_t)((int32_t)(sum[i] >> 23 & 255) - 127) : INT16_MIN;
                    lanes top, e, s;
                    memcpy(&top, top_of, sizeof top);
                    for (int j = 0; j < TERMS; j++) {
                        memcpy(&e, en + j * n_count, sizeof e);
                        e += ek[j];
                        lanes above = e > top;
                        top = (e & above) | (top & ~above);
                    }

                    wide_lanes total = {0};
                    for (int j = 0; j < TERMS; j++) {
                        memcpy(&e, en + j * n_count, sizeof e);
                        memcpy(&s, sn + j * n_count, sizeof s);
                        lanes p = s * sk[j];
                        lanes negative = p < 0; /* (x ^ negative) - negative takes the sign off and puts it back */
                        lanes down = top - e - ek[j];
                        lanes gone = down > 15;
                        down = (down & ~gone) | (gone & 15);
                        lanes magnitude = ((p ^ negative) - negative) << PRODUCT_SHIFT;
                        lanes cut = (lanes)((unsigned_lanes)magnitude >> (unsigned_lanes)down);
                        total += __builtin_convertvector((cut ^ negative) - negative, wide_lanes);
                    }

                    int32_t total_of[COLUMNS];
                    memcpy(total_of, &total, sizeof total);
                    memcpy(top_of, &top, sizeof top);
                    for (int i = 0; i < COLUMNS; i++) {
                        int32_t down = top_of[i] - ((int32_t)(sum[i] >> 23 & 255) - 127);
                        int32_t kept = (int32_t)((sum[i] & 0x7fffff) | 0x800000) >> (23 - FRACTION);
                        kept = sum[i] ? kept >> (down > 31 ? 31 : down) : 0;
                        float exact = (float)(total_of[i] + (sum[i] >> 31 ? -kept : kept)); /* below 2^24 */
                        uint32_t bits;
                        memcpy(&bits, &exact, sizeof bits);
                        /* Times 2^(top - 13): operands of 8 bits keep every sum far from FP32's exponent limits. */
                        sum[i] = bits ? (bits & FP32_CUT) + ((uint32_t)(top_of[i] - FRACTION) << 23) : 0;
                    }
                }
                for (int i = 0; i < COLUMNS; i++) {
                    float partial;
                    memcpy(&partial, &sum[i], sizeof partial);
                    promoted[i] = fmaf(partial, a_scale[m * groups + g] * b_scale[g * n_count + n + i], promoted[i]);
                }
            }
            memcpy(out + m * n_count + n, promoted, sizeof promoted);
        }
}
