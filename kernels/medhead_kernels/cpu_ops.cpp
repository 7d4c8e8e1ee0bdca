// Operators on a CPU. The first is x W^T for float32 rows and weights that stay in the type they are stored in: float32, bfloat16,
// float16, or groups of 8-bit or 4-bit integers with a scale (and a minimum). Weights are expanded to float32 while they are multiplied.
//
// The weights of 32 outputs form a panel, [inputs][32 outputs], so that neighbouring outputs are neighbouring lanes. Every output
// is the sum over groups of 32 (or 16) inputs of
//     scale * (sum of x[k] * q[k], k ascending) + minimum * (sum of x[k])
// in one order, whatever the number of rows or threads is: the result for a row does not depend on other rows.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>
#define MEDHEAD_AVX2
#endif

namespace {

constexpr int WIDTH = 32;      // outputs of a panel
constexpr int GROUP = 32;      // inputs that are read together
constexpr int LANES = 8;       // floats of a vector
constexpr int VECTORS = WIDTH / LANES;
constexpr int MAX_ROWS = 96;   // rows whose sums are kept beside the weights in the inner cache
constexpr int FEW_ROWS = 8;    // so many rows or fewer: weights are expanded in registers, again for every 4 rows; more: once, in memory
constexpr int LINE = 64;       // bytes of a line of the caches

typedef float Floats __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2), aligned(2)));
typedef int8_t SignedBytes __attribute__((vector_size(LANES), aligned(1)));
typedef uint8_t Bytes __attribute__((vector_size(LANES), aligned(1)));

#ifdef MEDHEAD_AVX2
inline Floats fma(Floats a, Floats b, Floats c) { return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
inline Floats all(float a) { return (Floats)_mm256_set1_ps(a); }
inline void keep_in_register(Floats& a) { asm("" : "+x"(a)); }
inline __m128i eight(const uint8_t* from) { return _mm_loadl_epi64((const __m128i*)from); }
inline Ints widen_signed(const uint8_t* from) { return (Ints)_mm256_cvtepi8_epi32(eight(from)); }
inline Ints widen_unsigned(const uint8_t* from) { return (Ints)_mm256_cvtepu8_epi32(eight(from)); }
inline Ints widen_halves(const uint8_t* from) { return (Ints)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)); }
inline Floats from_float16(const uint8_t* from) { return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from)); }
#else
inline Floats fma(Floats a, Floats b, Floats c) {
    for (int i = 0; i < LANES; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
}
inline Floats all(float a) { return Floats{a, a, a, a, a, a, a, a}; }
inline void keep_in_register(Floats&) {}
inline Ints widen_signed(const uint8_t* from) { return __builtin_convertvector(*(const SignedBytes*)from, Ints); }
inline Ints widen_unsigned(const uint8_t* from) { return __builtin_convertvector(*(const Bytes*)from, Ints); }
inline Ints widen_halves(const uint8_t* from) { return __builtin_convertvector(*(const Halves*)from, Ints); }
inline Floats from_float16(const uint8_t* from) {
    Floats found;
    for (int i = 0; i < LANES; i++) found[i] = (float)((const at::Half*)from)[i];
    return found;
}
#endif

// How a type is stored: bytes of the 32 weights of an input, whether groups have scales and minima, of how many inputs they are,
// and the expansion of the weights.
struct Plain {
    static constexpr bool SCALE = false, MINIMUM = false;
    static constexpr int SCALED = GROUP;
};
struct Float32 : Plain {
    static constexpr int STRIDE = WIDTH * 4;
    static Floats load(const uint8_t* from, int v) { return ((const Floats*)from)[v]; }
};
struct Bfloat16 : Plain {
    static constexpr int STRIDE = WIDTH * 2;
    static Floats load(const uint8_t* from, int v) { return (Floats)(widen_halves(from + v * LANES * 2) << 16); }
};
struct Float16 : Plain {
    static constexpr int STRIDE = WIDTH * 2;
    static Floats load(const uint8_t* from, int v) { return from_float16(from + v * LANES * 2); }
};
template <int SIZE>
struct Int8 {
    static constexpr int STRIDE = WIDTH, SCALED = SIZE;
    static constexpr bool SCALE = true, MINIMUM = false;
    static Floats load(const uint8_t* from, int v) { return __builtin_convertvector(widen_signed(from + v * LANES), Floats); }
};
struct Uint8 {
    static constexpr int STRIDE = WIDTH, SCALED = GROUP;
    static constexpr bool SCALE = true, MINIMUM = true;
    static Floats load(const uint8_t* from, int v) { return __builtin_convertvector(widen_unsigned(from + v * LANES), Floats); }
};
struct Int4 {  // byte i holds output i in its lower bits and output 16 + i in its upper ones
    static constexpr int STRIDE = WIDTH / 2, SCALED = GROUP;
    static constexpr bool SCALE = true, MINIMUM = true;
    static Floats load(const uint8_t* from, int v) {
        Ints pair = widen_unsigned(from + v % (VECTORS / 2) * LANES);
        return __builtin_convertvector(v < VECTORS / 2 ? pair & 15 : pair >> 4, Floats);
    }
};

struct Weights {
    const uint8_t* data;    // [panels][inputs][STRIDE]
    const float* scales;    // [panels][groups, or twice as many where they are of 16 inputs][32]
    const float* minimums;  // [panels][groups][32]
    int64_t inputs, outputs, groups, panels;
};

// Rows by groups of inputs, so that what a panel reads together lies together: a long row of its own would fill few sets of the
// inner cache.
struct Rows {
    std::vector<float> x;     // [groups][rows][32]; the last group is filled up with zeros
    std::vector<float> sums;  // [groups][rows] of the 32 inputs

    Rows(const float* from, int rows, int64_t inputs, int64_t groups, bool with_sums)
        : x(groups * rows * GROUP), sums(with_sums ? groups * rows : 0) {
        at::parallel_for(0, groups, 1 + (1 << 14) / (rows * GROUP), [&](int64_t begin, int64_t end) {
            for (int64_t g = begin; g < end; g++)
                for (int row = 0; row < rows; row++) {
                    float* to = x.data() + (g * rows + row) * GROUP;
                    const int64_t count = std::min<int64_t>(GROUP, inputs - g * GROUP);
                    std::memcpy(to, from + row * inputs + g * GROUP, sizeof(float) * count);
                    if (!with_sums) continue;
                    const Floats* parts = (const Floats*)to;
                    const Floats four = (parts[0] + parts[1]) + (parts[2] + parts[3]);
                    sums[g * rows + row] = ((four[0] + four[1]) + (four[2] + four[3])) + ((four[4] + four[5]) + (four[6] + four[7]));
                }
        });
    }
};

// Multiply one panel by all rows.
template <class Kind>
void multiply_panel(const Rows& given, int rows, const Weights& weights, int64_t panel, float* y) {
    alignas(64) float total[MAX_ROWS * WIDTH];
    alignas(64) float expanded[GROUP * WIDTH];
    const int64_t inputs = weights.inputs, groups = weights.groups;
    std::memset(total, 0, sizeof(float) * rows * WIDTH);
    for (int64_t g = 0; g < groups; g++) {
        const int count = (int)std::min<int64_t>(GROUP, inputs - g * GROUP);
        const uint8_t* data = weights.data + (panel * inputs + g * GROUP) * Kind::STRIDE;
        const uint8_t* next = data + 2 * GROUP * Kind::STRIDE;  // fetched while this group is multiplied, where many rows take time
        const float* scales = weights.scales + (panel * groups + g) * (GROUP / Kind::SCALED) * WIDTH;
        const float* minimums = weights.minimums + (panel * groups + g) * WIDTH;
        const float* from = given.x.data() + g * rows * GROUP;

        auto finish = [&](int row, int v, int part, Floats sum) {
            Floats& place = ((Floats*)(total + row * WIDTH))[v];
            Floats now = place;
            if constexpr (Kind::SCALE) now = fma(sum, ((const Floats*)(scales + part * WIDTH))[v], now);
            else now = now + sum;
            if constexpr (Kind::MINIMUM) now = fma(all(given.sums[g * rows + row]), ((const Floats*)minimums)[v], now);
            place = now;
        };
        // Rows `row` to `row + R`, V vectors of outputs at a time, so that sums, weights and a factor fit into 16 registers.
        auto tile = [&](auto R_, auto stored, const uint8_t* kept, int row) {
            using Stored = decltype(stored);
            constexpr int R = decltype(R_)::value, V = R == 4 ? 2 : 4;
            constexpr bool LOADED = R == 4 || std::is_same_v<Stored, Float32>;  // else there is no register for all expanded weights
            for (int first = 0; first < VECTORS; first += V)
                for (int begin = 0; begin < count; begin += Kind::SCALED) {
                    Floats sums[R][V] = {};
                    for (int k = begin; k < std::min(count, begin + Kind::SCALED); k++) {
                        if constexpr (R == 4 && std::is_same_v<Kind, Float32>)
                            __builtin_prefetch(next + (first / V * GROUP + k) * LINE);
                        auto load = [&](int v) { return Stored::load(kept + k * Stored::STRIDE, first + v); };
                        Floats w[V];
                        if constexpr (LOADED)
                            for (int v = 0; v < V; v++) w[v] = load(v);
                        if constexpr (std::is_same_v<Stored, Float32>)
                            for (int v = 0; v < V; v++) keep_in_register(w[v]);
                        for (int r = 0; r < R; r++) {
                            const Floats a = all(from[(row + r) * GROUP + k]);
                            for (int v = 0; v < V; v++) sums[r][v] = fma(a, LOADED ? w[v] : load(v), sums[r][v]);
                        }
                    }
                    for (int r = 0; r < R; r++)
                        for (int v = 0; v < V; v++) finish(row + r, first + v, begin / Kind::SCALED, sums[r][v]);
                }
        };
        auto all_rows = [&](auto stored, const uint8_t* kept) {
            int row = 0;
            for (; rows - row >= 4; row += 4) tile(std::integral_constant<int, 4>{}, stored, kept, row);
            if (rows - row >= 2) tile(std::integral_constant<int, 2>{}, stored, kept, row), row += 2;
            if (rows - row == 1) tile(std::integral_constant<int, 1>{}, stored, kept, row);
        };
        if (!std::is_same_v<Kind, Float32> && rows > 2)
            for (int at = 0; at < GROUP * Kind::STRIDE; at += LINE) __builtin_prefetch(next + at);
        if (std::is_same_v<Kind, Float32> || rows <= FEW_ROWS) {
            all_rows(Kind{}, data);
            continue;
        }
        for (int k = 0; k < count; k++)
            for (int v = 0; v < VECTORS; v++) ((Floats*)(expanded + k * WIDTH))[v] = Kind::load(data + k * Kind::STRIDE, v);
        all_rows(Float32{}, (const uint8_t*)expanded);
    }
    const int64_t width = std::min<int64_t>(WIDTH, weights.outputs - panel * WIDTH);
    for (int row = 0; row < rows; row++)
        std::memcpy(y + row * weights.outputs + panel * WIDTH, total + row * WIDTH, sizeof(float) * width);
}

template <class Kind>
void multiply(const float* x, int rows, const Weights& weights, float* y) {
    const Rows given(x, rows, weights.inputs, weights.groups, Kind::MINIMUM);
    const int64_t grain = 1 + (1 << 15) / (rows * weights.inputs * WIDTH);  // panels below which threads cost more than they save
    at::parallel_for(0, weights.panels, grain, [&](int64_t begin, int64_t end) {
        for (int64_t panel = begin; panel < end; panel++) multiply_panel<Kind>(given, rows, weights, panel, y);
    });
}

const float* floats(const std::optional<at::Tensor>& given) { return given ? given->const_data_ptr<float>() : nullptr; }

// x: [rows, inputs] float32. data: [panels, inputs, bytes of 32 outputs] uint8. scales, minimums: float32, see `Weights`,
// for kinds that have them. kind: an index into KINDS of block_linear.py. Returns [rows, outputs] float32.
at::Tensor block_linear(const at::Tensor& given, const at::Tensor& data, const std::optional<at::Tensor>& scales,
                        const std::optional<at::Tensor>& minimums, int64_t kind, int64_t outputs) {
    const at::Tensor x = given.contiguous();
    TORCH_CHECK(kind < 3 || scales, "block_linear: no scales");
    TORCH_CHECK((kind != 4 && kind != 5) || minimums, "block_linear: no minimums");
    TORCH_CHECK(x.scalar_type() == at::kFloat && x.dim() == 2 && data.size(1) == x.size(1), "block_linear: wrong rows");
    const int64_t inputs = x.size(1);
    const Weights weights{data.const_data_ptr<uint8_t>(), floats(scales), floats(minimums),
                          inputs, outputs, (inputs + GROUP - 1) / GROUP, data.size(0)};
    at::Tensor y = at::empty({x.size(0), outputs}, x.options());
    for (int64_t row = 0; row < x.size(0); row += MAX_ROWS) {
        const int rows = (int)std::min<int64_t>(MAX_ROWS, x.size(0) - row);
        const float* from = x.const_data_ptr<float>() + row * inputs;
        float* to = y.mutable_data_ptr<float>() + row * outputs;
        switch (kind) {
            case 0: multiply<Float32>(from, rows, weights, to); break;
            case 1: multiply<Bfloat16>(from, rows, weights, to); break;
            case 2: multiply<Float16>(from, rows, weights, to); break;
            case 3: multiply<Int8<GROUP>>(from, rows, weights, to); break;
            case 4: multiply<Int4>(from, rows, weights, to); break;
            case 5: multiply<Uint8>(from, rows, weights, to); break;
            case 6: multiply<Int8<GROUP / 2>>(from, rows, weights, to); break;
            default: TORCH_CHECK(false, "block_linear: unknown kind ", kind);
        }
    }
    return y;
}

// Write [batch, heads, nodes, dim] keys and values of one layer to its cache [batch, heads, tokens, dim], see cache_ops.py.
// rows: [batch, 1, nodes, 1] int64.
void write_rows(const at::Tensor& keys, const at::Tensor& values, const at::Tensor& new_keys, const at::Tensor& new_values,
                const at::Tensor& rows) {
    const at::Tensor places = rows.contiguous();
    const int64_t* place = places.const_data_ptr<int64_t>();
    for (auto& [cache, given] : {std::pair{keys, new_keys}, std::pair{values, new_values}}) {
        const at::Tensor added = given.to(cache.scalar_type()).contiguous();
        TORCH_CHECK(cache.stride(3) == 1 && cache.size(3) == added.size(3), "write_rows: wrong cache");
        const int64_t heads = added.size(1), nodes = added.size(2), bytes = added.size(3) * added.element_size();
        const char* from = (const char*)added.const_data_ptr();
        char* to = (char*)cache.mutable_data_ptr();
        for (int64_t b = 0; b < added.size(0); b++)
            for (int64_t h = 0; h < heads; h++)
                for (int64_t n = 0; n < nodes; n++, from += bytes) {
                    const int64_t row = place[b * nodes + n];
                    TORCH_CHECK(row >= 0 && row < cache.size(2), "write_rows: row ", row, " of ", cache.size(2));
                    std::memcpy(to + (b * cache.stride(0) + h * cache.stride(1) + row * cache.stride(2)) * added.element_size(), from, bytes);
                }
    }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(medhead, library) {
    library.def("block_linear(Tensor x, Tensor data, Tensor? scales, Tensor? minimums, int kind, int outputs) -> Tensor");
}

TORCH_LIBRARY_IMPL(medhead, CPU, library) {
    library.impl("block_linear", block_linear);
    library.impl("write_rows", write_rows);
}
