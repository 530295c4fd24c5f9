/* Langevin chains on p(z) proportional to exp(f(z)) N(z; 0, I), f an MLP. Called by chain.py.

   Chains lie along the lanes of SIMD registers: a block of up to VECTORS vectors of chains keeps its positions
   and hidden values in cache as (feature, chain), weights are broadcast, and sums over the inputs of up to
   ROWS features stay in registers. Products are fused with sums only where it says so (and -ffp-contract=off),
   so that what a chain computes depends neither on its block nor on the number of threads. */

#include "simd.h"

#include <pthread.h>
#include <stdlib.h>

/* Sums of a tile: enough to hide an FMA's latency (8: 4 cycles, 2 a cycle), no more than registers hold. */
#if defined(__AVX512F__)
#define VECTORS 2 /* of a large block */
#define SUMS 20
#define ROWS(vectors) 10 /* 10 x 2 sums, 2 inputs and a weight: 23 of 32 registers */
#elif defined(__AVX2__)
#define VECTORS 3
#define SUMS 12 /* 12, 2 inputs and a weight: 15 of 16 registers; the third input stays in memory */
#define ROWS(vectors) (SUMS / (vectors))
#else
#define VECTORS 2
#define SUMS 10
#define ROWS(vectors) (SUMS / (vectors))
#endif

/* The same, field by field, as _Job in chain.py. All arrays are float32 and contiguous. */
typedef struct {
    int64_t chains, dims, steps, first_step, depth, activation, threads;
    const int64_t *widths;          /* of each hidden layer */
    const float *const *weights;    /* of each hidden layer (out, in) */
    const float *const *transposed; /* of each hidden layer (in, out) */
    const float *const *biases;
    const float *last; /* weight of the output */
    const float *noise; /* (steps, chains, dims); NULL: drawn here */
    float *z;           /* (chains, dims): in the start, out the positions */
    float *gradient;    /* (chains, dims): out, of log p at the last step */
    float step_size, slope;
    uint32_t key[2];
} Job;

/* `activation` of a Job: the order is that of _ACTIVATIONS in chain.py, and of the products forward below. */
enum { LEAKY_RELU, SILU, SOFTPLUS };

/* Products: forward through an activation, backward through the LeakyReLU or a smooth activation, plain. */
enum { FORWARD, FORWARD_SILU, FORWARD_SOFTPLUS, BACKWARD, BACKWARD_SMOOTH, PLAIN, KINDS };

/* out[r] = sum_i weight[i * stride + r] x[i] for r < rows. Forward: plus bias[r], through the activation.
   Backward: times the activation's slope. A LeakyReLU keeps the sign, so that the value that out[r] held says
   the slope; a smooth activation stores its slopes behind its values, `stride` features on. */
INLINE void tile(int rows, int vectors, int kind, int64_t inputs, int64_t stride, const float *weight,
                 const floats *x, const float *bias, float slope, floats *out) {
    floats sum[SUMS], in[2];
    for (int r = 0; r < rows; r++)
        for (int v = 0; v < vectors; v++) sum[r * vectors + v] = all(kind < BACKWARD ? bias[r] : 0.0f);
    for (int64_t i = 0; i < inputs; i++, x += vectors) {
        for (int v = 0; v < vectors && v < 2; v++) in[v] = held(x[v]);
        for (int r = 0; r < rows; r++) {
            const floats w = all(weight[i * stride + r]);
            for (int v = 0; v < vectors; v++) {
                floats *s = sum + r * vectors + v;
                *s = v < 2 ? fused(w, in[v], *s) : fused_from(w, x + v, *s);
            }
        }
    }
    floats *slopes = out + stride * vectors;
    for (int j = 0; j < rows * vectors; j++)
        if (kind == PLAIN) out[j] = sum[j];
        else if (kind == FORWARD_SILU) out[j] = silu(sum[j], slopes + j);
        else if (kind == FORWARD_SOFTPLUS) out[j] = softplus(sum[j], slopes + j);
        else if (kind == BACKWARD_SMOOTH) out[j] = sum[j] * slopes[j];
        else /* one product by 1 or the slope leaves the FMA units freer than a choice between two does */
            out[j] = sum[j] * choose((kind == FORWARD ? sum[j] : out[j]) > 0, all(1), all(slope));
}

#define TILE(N)                                                                                           \
    case N:                                                                                               \
        if (N <= ROWS(vectors)) /* always, but the compiler cannot know it */                             \
            tile(N, vectors, kind, inputs, outputs, weight + o, x, bias + o, slope, out + o * vectors);   \
        break;

/* All outputs in tiles as equal as can be: in a low tile there are too few sums to hide the latency. */
INLINE void tiles(int vectors, int kind, int64_t outputs, int64_t inputs, const float *weight,
                  const floats *x, const float *bias, float slope, floats *out) {
    const int64_t count = (outputs + ROWS(vectors) - 1) / ROWS(vectors);
    for (int64_t t = 0, o = 0, rows; t < count; t++, o += rows) {
        rows = outputs / count + (t < outputs % count);
        switch (rows) {
            TILE(1) TILE(2) TILE(3) TILE(4) TILE(5) TILE(6) TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12)
        }
    }
}

/* product[vectors - 1][kind]: functions of their own, so that nothing else claims registers in their loops. */
typedef void Product(int64_t outputs, int64_t inputs, const float *weight, const floats *x, const float *bias,
                     float slope, floats *out);
#define PRODUCT(kind, vectors)                                                                            \
    static __attribute__((noinline)) void kind##vectors(int64_t outputs, int64_t inputs,                  \
                                                        const float *weight, const floats *x,             \
                                                        const float *bias, float slope, floats *out) {    \
        tiles(vectors, kind, outputs, inputs, weight, x, bias, slope, out);                               \
    }
#define PRODUCTS(vectors)                                                                                 \
    PRODUCT(FORWARD, vectors) PRODUCT(FORWARD_SILU, vectors) PRODUCT(FORWARD_SOFTPLUS, vectors)           \
    PRODUCT(BACKWARD, vectors) PRODUCT(BACKWARD_SMOOTH, vectors) PRODUCT(PLAIN, vectors)
#define ROW(v) {FORWARD##v, FORWARD_SILU##v, FORWARD_SOFTPLUS##v, BACKWARD##v, BACKWARD_SMOOTH##v, PLAIN##v}
PRODUCTS(1)
PRODUCTS(2)
#if VECTORS > 2
PRODUCTS(3)
static Product *const product[VECTORS][KINDS] = {ROW(1), ROW(2), ROW(3)};
#else
static Product *const product[VECTORS][KINDS] = {ROW(1), ROW(2)};
#endif

/* The even words of a times b, 64 bits each. */
INLINE wide products(wide a, uint32_t b) {
#if defined(__AVX512F__)
    return (wide)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
    return (wide)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
    return (a & 0xFFFFFFFFu) * b;
#endif
}

/* Philox4x32-10 (Salmon et al. 2011), four words in place. Even and odd words stay apart to the end, each in
   the low half of 64 bits: products do not read the high half, so no round has to part or to join them. */
INLINE void philox(words c[4], const uint32_t key[2]) {
    wide half[2][4];
    for (int i = 0; i < 4; i++) half[0][i] = (wide)c[i], half[1][i] = (wide)c[i] >> 32;
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        for (int h = 0; h < 2; h++) {
            wide *w = half[h];
            const wide first = products(w[0], 0xD2511F53u), second = products(w[2], 0xCD9E8D57u);
            w[0] = (second >> 32) ^ (w[1] ^ k0), w[1] = second;
            w[2] = (first >> 32) ^ (w[3] ^ k1), w[3] = first;
        }
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    for (int i = 0; i < 4; i++) c[i] = (words)((half[0][i] & 0xFFFFFFFFu) | (half[1][i] << 32));
}

/* Box and Muller's two normals of two words. The radius takes 24 bits of a. Of b, two bits choose the quarter
   turn and 23 the angle in (-pi/4, pi/4) within it; polynomials of Cephes' sinf and cosf. */
INLINE void normals(words a, words b, floats *first, floats *second) {
    const floats u = __builtin_convertvector((ints)(a >> 8) + 1, floats) * 0x1p-24f;
    const floats radius = square_root(-2.0f * logarithm(u));
    const floats turn = __builtin_convertvector((ints)((b << 2) >> 9), floats) * 0x1p-23f + (0x1p-24f - 0.5f);
    const floats t = turn * 1.57079632679f, t2 = t * t;
    floats sine = fused(all(-1.9515295891e-4f), t2, all(8.3321608736e-3f));
    sine = fused(fused(sine, t2, all(-1.6666654611e-1f)), t2 * t, t);
    floats cosine = fused(all(2.443315712e-5f), t2, all(-1.388731625e-3f));
    cosine = fused(fused(fused(cosine, t2, all(4.166664568e-2f)), t2, all(-0.5f)), t2, all(1));
    /* Bit 30 of b: sine or cosine; bit 31 of b, or of b a quarter turn on: the sign. */
    const ints odd = (ints)(b << 1) < 0;
    const words sign = (words){0} + 0x80000000u;
    *first = radius * (floats)((words)choose(odd, sine, cosine) ^ ((b + 0x40000000u) & sign));
    *second = radius * (floats)((words)choose(odd, cosine, sine) ^ (b & sign));
}

/* Features that a hidden layer keeps from forward to backward: values, and slopes of a smooth activation. */
INLINE int64_t held_of(const Job *job, int64_t layer) {
    return job->widths[layer] * (job->activation == LEAKY_RELU ? 1 : 2);
}

/* Vectors of scratch memory that a block of `vectors` needs. */
INLINE int64_t scratch(const Job *job, int vectors) {
    int64_t features = 3 * job->dims + 4; /* positions, gradient, noise in fours */
    for (int64_t j = 0; j < job->depth; j++) features += held_of(job, j);
    return features * vectors;
}

INLINE void block(const Job *job, int vectors, int64_t first, floats *memory) {
    const int64_t dims = job->dims, depth = job->depth, width = vectors * LANES;
    const int64_t chains = job->chains - first < width ? job->chains - first : width;
    const float s = job->step_size, half = 0.5f * s * s, slope = job->slope;
    floats *z = memory, *gradient = z + dims * vectors, *noise = gradient + dims * vectors;
    floats *hidden[depth];
    hidden[0] = noise + (dims + 4) * vectors;
    for (int64_t j = 1; j < depth; j++) hidden[j] = hidden[j - 1] + held_of(job, j - 1) * vectors;
    Product *const *kinds = product[vectors - 1];
    Product *const forward = kinds[FORWARD + job->activation];
    Product *const backward = kinds[job->activation == LEAKY_RELU ? BACKWARD : BACKWARD_SMOOTH];
    words index = {0};
    for (int l = 0; l < LANES; l++) ((uint32_t *)&index)[l] = (uint32_t)(first + l);

    for (int64_t i = 0; i < dims * vectors; i++) z[i] = noise[i] = (floats){0};
    for (int64_t c = 0; c < chains; c++)
        for (int64_t d = 0; d < dims; d++) ((float *)z)[d * width + c] = job->z[(first + c) * dims + d];
    for (int64_t k = 0; k < job->steps; k++) {
        const floats *x = z;
        int64_t inputs = dims;
        for (int64_t j = 0; j < depth; j++) {
            forward(job->widths[j], inputs, job->transposed[j], x, job->biases[j], slope, hidden[j]);
            x = hidden[j], inputs = job->widths[j];
        }
        for (int64_t o = 0; o < inputs; o++)
            for (int v = 0; v < vectors; v++) {
                const floats weight = all(job->last[o]);
                floats *value = hidden[depth - 1] + o * vectors + v;
                if (job->activation == LEAKY_RELU) *value = choose(*value > 0, weight, slope * weight);
                else *value = weight * value[inputs * vectors];
            }
        for (int64_t j = depth - 1; j > 0; j--) /* a layer's gradient takes the place of its values */
            backward(job->widths[j - 1], job->widths[j], job->weights[j], hidden[j], job->biases[j - 1],
                     slope, hidden[j - 1]);
        kinds[PLAIN](dims, job->widths[0], job->weights[0], hidden[0], job->weights[0], 0,
                     gradient); /* a bias is not read here, nor above */
        if (k == job->steps - 1)
            for (int64_t c = 0; c < chains; c++)
                for (int64_t d = 0; d < dims; d++)
                    job->gradient[(first + c) * dims + d] =
                        ((float *)gradient)[d * width + c] - ((float *)z)[d * width + c];
        if (job->noise) {
            const float *given = job->noise + (k * job->chains + first) * dims;
            for (int64_t c = 0; c < chains; c++)
                for (int64_t d = 0; d < dims; d++) ((float *)noise)[d * width + c] = given[c * dims + d];
        } else {
            for (int64_t d = 0; d < dims; d += 4)
                for (int v = 0; v < vectors; v++) {
                    words c[4] = {index + (uint32_t)(v * LANES),
                                  (words){0} + (uint32_t)(job->first_step + k),
                                  (words){0} + (uint32_t)(d / 4), (words){0}};
                    floats *out = noise + d * vectors + v;
                    philox(c, job->key);
                    normals(c[0], c[1], out, out + vectors);
                    normals(c[2], c[3], out + 2 * vectors, out + 3 * vectors);
                }
        }
        for (int64_t i = 0; i < dims * vectors; i++)
            z[i] = fused(all(s), noise[i], fused(all(half), gradient[i] - z[i], z[i]));
    }
    for (int64_t c = 0; c < chains; c++)
        for (int64_t d = 0; d < dims; d++) job->z[(first + c) * dims + d] = ((float *)z)[d * width + c];
}

typedef struct {
    const Job *job;
    int64_t begin, end;
    floats *memory;
} Share;

static void *run(void *given) {
    const Share *share = given;
    for (int64_t first = share->begin, vectors; first < share->end; first += vectors * LANES) {
        const int64_t left = (share->end - first + LANES - 1) / LANES;
        vectors = left == 4 ? 2 : left < VECTORS ? left : VECTORS; /* 4 = 2 + 2: one alone costs more */
        if (vectors == 1) block(share->job, 1, first, share->memory);
        if (vectors == 2) block(share->job, 2, first, share->memory);
#if VECTORS > 2
        if (vectors == 3) block(share->job, 3, first, share->memory);
#endif
    }
    return NULL;
}

/* Runs the job; returns 0, or -1 (and nothing was done) where there is no memory for it. */
int jebm_chain(const Job *job) {
    const int64_t blocks = (job->chains + LANES - 1) / LANES;
    const int64_t threads = job->threads < blocks ? job->threads : blocks;
    const int64_t each = scratch(job, VECTORS);
    floats *memory = NULL;
    if (threads < 1) return 0;
    if (posix_memalign((void **)&memory, sizeof(floats), threads * each * sizeof(floats))) return -1;
    pthread_t thread[threads];
    Share share[threads];
    for (int64_t t = 0; t < threads; t++) {
        const int64_t begin = blocks * t / threads * LANES, end = blocks * (t + 1) / threads * LANES;
        share[t] = (Share){job, begin, end < job->chains ? end : job->chains, memory + t * each};
    }
    int64_t started = 1;
    while (started < threads && !pthread_create(&thread[started], NULL, run, &share[started])) started++;
    run(&share[0]);
    for (int64_t t = started; t < threads; t++) run(&share[t]); /* those that got no thread */
    for (int64_t t = 1; t < started; t++) pthread_join(thread[t], NULL);
    free(memory);
    return 0;
}
