/* Vectors of floats of the CPU's own length, and the functions of them that chain.c needs. */

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#include <stdint.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
#define INLINE static inline __attribute__((always_inline))

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint64_t wide __attribute__((vector_size(4 * LANES)));

INLINE floats choose(ints where, floats yes, floats no) {
    return (floats)((where & (ints)yes) | (~where & (ints)no));
}

/* a * b + c, rounded once where the CPU can. */
INLINE floats fused(floats a, floats b, floats c) {
#if defined(__AVX512F__)
    return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    return (floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__FP_FAST_FMAF)
    float *x = (float *)&a, *y = (float *)&b, *sum = (float *)&c;
    for (int l = 0; l < LANES; l++) sum[l] = __builtin_fmaf(x[l], y[l], sum[l]);
    return c;
#else
    return a * b + c;
#endif
}

/* The same with b read from memory, and a value read into a register once for all its uses. Compilers left to
   themselves choose otherwise, run out of AVX2's 16 registers and keep sums in memory: 20 to 40 % slower. */
INLINE floats fused_from(floats a, const floats *b, floats c) {
#if defined(__AVX2__) && defined(__FMA__) && !defined(__AVX512F__)
    __asm__("vfmadd231ps %2, %1, %0" : "+x"(c) : "x"(a), "m"(*b));
    return c;
#else
    return fused(a, *b, c);
#endif
}

INLINE floats held(floats x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
    __asm__("" : "+x"(x));
#endif
    return x;
}

/* Minus, since a + 0 is not a for a = -0, so that a compiler would have to add. */
INLINE floats all(float a) { return a - (floats){0}; }

/* log of a positive x: x = 2^e (1 + m), 1 + m in [sqrt(1/2), sqrt(2)); polynomial of Cephes' logf. */
INLINE floats logarithm(floats x) {
    const ints e = ((ints)x - 0x3F3504F3) >> 23;
    const floats m = (floats)((ints)x - (e << 23)) - 1.0f, n = __builtin_convertvector(e, floats), m2 = m * m;
    static const float c[] = {-1.1514610310e-1f, 1.1676998740e-1f,  -1.2420140846e-1f,
                              1.4249322787e-1f,  -1.6668057665e-1f, 2.0000714765e-1f,
                              -2.4999993993e-1f, 3.3333331174e-1f,  -0.5f};
    floats y = all(7.0376836292e-2f);
    for (int i = 0; i < 9; i++) y = fused(y, m, all(c[i]));
    return fused(n, all(0.693147181f), fused(y, m2, m));
}

INLINE floats square_root(floats x) {
    floats y = x;
    for (int l = 0; l < LANES; l++) ((float *)&y)[l] = __builtin_sqrtf(((float *)&x)[l]);
    return y;
}

/* exp of x <= 0, to 2e-7 of the value; exp(-87) below -87. x = n log 2 + r: polynomial of Cephes' expf, and n
   in the last bits of a sum, from where a shift brings it into an exponent. A factor, so that NaN stays. */
INLINE floats exponential(floats x) {
    x = choose(x < -87.0f, all(-87.0f), x);
    const floats shifted = fused(x, all(1.44269504f), all(0x1.8p23f)), n = shifted - 0x1.8p23f;
    const floats r = fused(n, all(2.12194440e-4f), fused(n, all(-0.693359375f), x));
    static const float c[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                              5.0000001201e-1f};
    floats y = all(1.9875691500e-4f);
    for (int i = 0; i < 5; i++) y = fused(y, r, all(c[i]));
    return (fused(y, r * r, r) + 1.0f) * (floats)(((words)shifted << 23) + (127u << 23));
}

/* The logistic function of x, and of -x without a difference from 1; exp(-|x|) on the way. */
INLINE floats logistic(floats x, floats *opposite, floats *tail) {
    *tail = exponential((floats)((words)x | 0x80000000u));
    const floats large = 1.0f / (*tail + 1.0f), small = *tail * large;
    *opposite = choose(x > 0, small, large);
    return choose(x > 0, large, small);
}

/* SiLU, x logistic(x), and its slope. */
INLINE floats silu(floats x, floats *slope) {
    floats opposite, tail;
    const floats share = logistic(x, &opposite, &tail), value = x * share;
    *slope = fused(value, opposite, share);
    return value;
}

/* Softplus, log(1 + exp(x)), and its slope. What 1 + exp(-|x|) loses by rounding is added again. */
INLINE floats softplus(floats x, floats *slope) {
    floats opposite, tail;
    *slope = logistic(x, &opposite, &tail);
    const floats sum = tail + 1.0f, lost = tail - (sum - 1.0f);
    return choose(x < 0, all(0), x) + (logarithm(sum) + lost / sum);
}
