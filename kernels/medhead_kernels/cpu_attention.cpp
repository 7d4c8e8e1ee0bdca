// Attention of tree nodes on a CPU, whose result for a node depends on the node's own path alone: not on the other nodes, the
// other rows, the number of threads, or on where the keys of its ancestors lie.
//
// Keys are counted by their position in the text. Positions are cut into blocks of 64 and spans of 512, at multiples of these
// numbers. Inside a span the blocks are summed one after the other (an online softmax), spans are computed apart and merged in
// their order. Every score is a sum over the dimensions in one order, every output a sum over positions in ascending order.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>
#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define MEDHEAD_AVX2
#endif

namespace {

constexpr int LANES = 8;      // floats of a vector
constexpr int BLOCK = 64;     // positions that are summed together
constexpr int SPAN = 512;     // positions that one task sums
constexpr int TILE = 4;       // queries that share what is loaded
constexpr float NEVER = -std::numeric_limits<float>::infinity();

typedef float Floats __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4), aligned(4)));

inline Floats all(float a) { return Floats{a, a, a, a, a, a, a, a}; }
inline float sum_of(Floats x) { return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7])); }
#ifdef MEDHEAD_AVX2
inline void sums_of(Floats a, Floats b, Floats c, Floats d, float* to) {  // `sum_of` of each
    const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps((__m256)a, (__m256)b), _mm256_hadd_ps((__m256)c, (__m256)d));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1)));
}
inline Floats fma(Floats a, Floats b, Floats c) { return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
#else
inline void sums_of(Floats a, Floats b, Floats c, Floats d, float* to) { to[0] = sum_of(a), to[1] = sum_of(b), to[2] = sum_of(c), to[3] = sum_of(d); }
inline Floats fma(Floats a, Floats b, Floats c) {
    for (int i = 0; i < LANES; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
}
#endif

// e^x for x <= 0, lane by lane; 0 below -87. The polynomial is the Taylor series to the seventh power on |r| <= ln(2) / 2.
inline Floats exponential(Floats x) {
    const Ints tiny = x < all(-87.0f);
    const Floats magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const Floats shifted = fma(x, all(1.44269504f), magic), n = shifted - magic;
    Floats r = fma(n, all(-0.693359375f), x);
    r = fma(n, all(2.12194440e-4f), r);
    Floats y = all(1.0f / 5040);
    for (float factor : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) y = fma(y, r, all(factor));
    const Ints power = ((Ints)shifted - (Ints)magic + 127) << 23;
    const Floats value = y * (Floats)power;
    return (Floats)((Ints)value & ~tiny);
}

struct Task {
    int64_t row, head, span;
};

struct Given {
    at::Tensor query, key, value;  // [batch, heads, nodes, dim], [batch, kv_heads, tokens, dim], [batch, kv_heads, tokens, value_dim]
    const int64_t *lengths, *depth, *path, *first;  // [batch], [batch, nodes], [batch, nodes, deep], [batch, nodes]
    int64_t batch, heads, kv_heads, nodes, dim, value_dim, deep, group;
    float scale, softcap;  // softcap 0: none

    int64_t last(int64_t row, int64_t node) const { return lengths[row] + depth[row * nodes + node]; }
};

// The sums of one query over one span.
struct Sums {
    float largest = NEVER;
    Floats total = {};  // of the weights; position p adds to lane p % 8
};

template <class T>
void to_floats(const T* from, float* to, int64_t count) {
    for (int64_t i = 0; i < count; i++) to[i] = (float)from[i];
}

// c[r][column] = start + sum over k of a[r][k] * b[k][column], k from `begin` to `end` ascending; columns a multiple of 8.
template <int R, int V>
inline void tile(const float* a, int64_t a_step, const float* b, int64_t b_step, int begin, int end, float* c, int64_t c_step) {
    Floats sums[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) sums[r][v] = ((const Floats*)(c + r * c_step))[v];
    for (int k = begin; k < end; k++)
        for (int r = 0; r < R; r++) {
            const Floats x = all(a[r * a_step + k]);
            for (int v = 0; v < V; v++) sums[r][v] = fma(x, ((const Floats*)(b + k * b_step))[v], sums[r][v]);
        }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) ((Floats*)(c + r * c_step))[v] = sums[r][v];
}

template <int R>
inline void tiles(const float* a, int64_t a_step, const float* b, int64_t b_step, int begin, int end, float* c, int64_t c_step, int columns) {
    int column = 0;
    constexpr int V = R == 1 ? 8 : 2;
    for (; columns - column >= V * LANES; column += V * LANES)
        tile<R, V>(a, a_step, b + column, b_step, begin, end, c + column, c_step);
    for (; column < columns; column += LANES) tile<R, 1>(a, a_step, b + column, b_step, begin, end, c + column, c_step);
}

// Scores of R queries and 4 keys, [dim] each: dimension d adds to lane d % 8, then the lanes are summed.
template <int R>
inline void four_scores(const float* queries, const float* keys, int64_t dim, float* c, int64_t c_step) {
    Floats sums[R][4] = {};
    for (int64_t d = 0; d < dim; d += LANES)
        for (int r = 0; r < R; r++) {
            const Floats x = *(const Floats*)(queries + r * dim + d);
            for (int k = 0; k < 4; k++) sums[r][k] = fma(x, *(const Floats*)(keys + k * dim + d), sums[r][k]);
        }
    for (int r = 0; r < R; r++) sums_of(sums[r][0], sums[r][1], sums[r][2], sums[r][3], c + r * c_step);
}

// Scores of queries [rows, dim] and keys [count, dim], count a multiple of 4.
void score(const float* queries, int rows, const float* keys, int count, int64_t dim, float* c, int64_t c_step) {
    for (int k = 0; k < count; k += 4) {
        int row = 0;
        for (; rows - row >= 2; row += 2) four_scores<2>(queries + row * dim, keys + k * dim, dim, c + row * c_step + k, c_step);
        if (row < rows) four_scores<1>(queries + row * dim, keys + k * dim, dim, c + row * c_step + k, c_step);
    }
}

// `rows` rows of a times b, TILE rows together; the order of every sum does not depend on that.
void product(const float* a, int64_t a_step, const float* b, int64_t b_step, int begin, int end, float* c, int64_t c_step, int rows, int columns) {
    int row = 0;
    for (; rows - row >= TILE; row += TILE) tiles<TILE>(a + row * a_step, a_step, b, b_step, begin, end, c + row * c_step, c_step, columns);
    for (; row < rows; row++) tiles<1>(a + row * a_step, a_step, b, b_step, begin, end, c + row * c_step, c_step, columns);
}

// Turn the scores of a block into weights, and scale what was summed before. `scores` [64], positions outside [low, high) count nothing.
inline void weigh(float* scores, int low, int high, float softcap, Sums& sums, float* out, int64_t value_dim) {
    Floats* lanes = (Floats*)scores;
    if (softcap > 0)
        for (int i = low; i < high; i++) scores[i] = softcap * std::tanh(scores[i] / softcap);
    for (int i = 0; i < low; i++) scores[i] = NEVER;
    for (int i = high; i < BLOCK; i++) scores[i] = NEVER;
    float largest = sums.largest;
    for (int i = low; i < high; i++) largest = std::max(largest, scores[i]);
    const float factor = exponential(all(sums.largest - largest))[0];
    sums.largest = largest;
    Floats total = sums.total * all(factor);
    for (int v = 0; v < BLOCK / LANES; v++) total += lanes[v] = exponential(lanes[v] - all(largest));
    sums.total = total;
    if (factor != 1)
        for (int v = 0; v < value_dim / LANES; v++) ((Floats*)out)[v] *= all(factor);
}

// All queries of the nodes that share a head of keys, over one span of positions: sums [queries] and out [queries, value_dim].
template <class T>
void span_of(const Given& g, const Task& task, const float* queries, Sums* sums, float* out) {
    const int64_t length = g.lengths[task.row], dim = g.dim, value_dim = g.value_dim;
    const int count = (int)(g.nodes * g.group), nodes = (int)g.nodes;
    const int64_t padded = (nodes + 3) / 4 * 4;
    const T* keys = g.key.const_data_ptr<T>() + task.row * g.key.stride(0) + task.head * g.key.stride(1);
    const T* values = g.value.const_data_ptr<T>() + task.row * g.value.stride(0) + task.head * g.value.stride(1);
    const int64_t key_step = g.key.stride(2), value_step = g.value.stride(2);
    thread_local std::vector<float> held_keys, held_values, scores, tree_scores, tree_values;
    held_keys.resize(dim * std::max<int64_t>(BLOCK, padded)), held_values.resize(BLOCK * value_dim), scores.resize((int64_t)count * BLOCK);
    const int64_t begin = task.span * SPAN, end = begin + SPAN;

    auto hold = [](const T* from, int64_t step, int64_t number, int64_t width, float* to) {
        for (int64_t i = 0; i < number; i++) to_floats(from + i * step, to + i * width, width);
    };
    int64_t deepest = 0;
    for (int node = 0; node < nodes; node++) deepest = std::max(deepest, g.last(task.row, node));
    if (deepest >= begin && end > length) {  // scores and values of the tree's own nodes
        tree_scores.resize(count * padded), tree_values.resize(nodes * value_dim);
        hold(keys + length * key_step, key_step, nodes, dim, held_keys.data());
        hold(values + length * value_step, value_step, nodes, value_dim, tree_values.data());
        score(queries, count, held_keys.data(), (int)padded, dim, tree_scores.data(), padded);
    }
    for (int64_t from = begin; from < end && from <= deepest; from += BLOCK) {
        const int shared = (int)std::clamp<int64_t>(length - from, 0, BLOCK);  // positions before the tree
        if (shared) {
            hold(keys + from * key_step, key_step, shared, dim, held_keys.data());
            hold(values + from * value_step, value_step, shared, value_dim, held_values.data());
            score(queries, count, held_keys.data(), (shared + 3) / 4 * 4, dim, scores.data(), BLOCK);
        }
        const bool together = shared == BLOCK;
        int pending = 0;  // first query whose weights are not yet multiplied with the values
        auto flush = [&](int until) {
            if (until > pending)
                product(scores.data() + pending * BLOCK, BLOCK, held_values.data(), value_dim, 0, BLOCK, out + pending * value_dim, value_dim, until - pending, (int)value_dim);
            pending = until;
        };
        for (int query = 0; query < count; query++) {
            const int node = query / (int)g.group;
            const int64_t last = g.last(task.row, node), first = g.first ? g.first[task.row * nodes + node] : 0;
            const int low = (int)std::clamp<int64_t>(first - from, 0, BLOCK), high = (int)std::clamp<int64_t>(last + 1 - from, 0, BLOCK);
            float* own = scores.data() + query * BLOCK;
            float* to = out + query * value_dim;
            if (low >= high) {
                flush(query), pending = query + 1;
                continue;
            }
            const int64_t* path = g.path + (task.row * nodes + node) * g.deep;
            for (int i = std::max(low, shared); i < high; i++) own[i] = tree_scores[query * padded + path[from + i - length]];
            weigh(own, low, high, g.softcap, sums[query], to, value_dim);
            if (together && low == 0) continue;
            flush(query), pending = query + 1;
            if (shared > low) product(own, BLOCK, held_values.data(), value_dim, low, std::min(shared, high), to, value_dim, 1, (int)value_dim);
            for (int i = std::max(low, shared); i < high; i++)
                product(own + i, BLOCK, tree_values.data() + path[from + i - length] * value_dim, value_dim, 0, 1, to, value_dim, 1, (int)value_dim);
        }
        if (together) flush(count);
    }
}

// Merge the spans of a query in their order and write its output.
template <class T>
void merge(const Sums* sums, const float* out, int64_t spans, int64_t step, int64_t value_dim, const float* sink, T* to) {
    float largest = sink ? *sink : NEVER;
    for (int64_t s = 0; s < spans; s++) largest = std::max(largest, sums[s * step].largest);
    float total = sink ? exponential(all(*sink - largest))[0] : 0;
    std::vector<float> found(value_dim, 0.0f);
    for (int64_t s = 0; s < spans; s++) {
        const Sums& one = sums[s * step];
        if (one.largest == NEVER) continue;
        const float factor = exponential(all(one.largest - largest))[0];
        total += factor * sum_of(one.total);
        const float* from = out + s * step * value_dim;
        for (int64_t v = 0; v < value_dim; v++) found[v] = found[v] + factor * from[v];
    }
    for (int64_t v = 0; v < value_dim; v++) to[v] = (T)(found[v] / total);
}

template <class T>
void attend(const Given& g, const std::optional<at::Tensor>& sinks, at::Tensor& result) {
    const int64_t count = g.nodes * g.group, pairs = g.batch * g.kv_heads;
    const at::Tensor query = g.query.to(at::kFloat).contiguous();  // a head of keys has `group` neighbouring heads of queries
    std::vector<float> queries(pairs * count * g.dim);
    int64_t deepest = 0;
    for (int64_t row = 0; row < g.batch; row++)
        for (int64_t node = 0; node < g.nodes; node++) deepest = std::max(deepest, g.last(row, node));
    for (int64_t row = 0; row < g.batch; row++)
        for (int64_t head = 0; head < g.heads; head++)
            for (int64_t node = 0; node < g.nodes; node++) {
                const int64_t at = ((row * g.kv_heads + head / g.group) * count + node * g.group + head % g.group) * g.dim;
                const float* from = query.const_data_ptr<float>() + ((row * g.heads + head) * g.nodes + node) * g.dim;
                for (int64_t d = 0; d < g.dim; d++) queries[at + d] = from[d] * g.scale;
            }
    const int64_t spans = deepest / SPAN + 1, step = pairs * count;
    std::vector<Sums> sums(spans * step);
    std::vector<float> out(spans * step * g.value_dim, 0.0f);
    at::parallel_for(0, spans * pairs, 1, [&](int64_t begin, int64_t end) {
        for (int64_t at = begin; at < end; at++) {
            const Task task{at % pairs / g.kv_heads, at % pairs % g.kv_heads, at / pairs};
            const int64_t place = at * count;
            span_of<T>(g, task, queries.data() + at % pairs * count * g.dim, sums.data() + place, out.data() + place * g.value_dim);
        }
    });
    const float* sink = sinks ? sinks->const_data_ptr<float>() : nullptr;
    T* to = result.mutable_data_ptr<T>();  // [batch, nodes, heads, value_dim]
    at::parallel_for(0, step, 16, [&](int64_t begin, int64_t end) {
        for (int64_t at = begin; at < end; at++) {
            const int64_t pair = at / count, row = pair / g.kv_heads, node = at % count / g.group;
            const int64_t head = pair % g.kv_heads * g.group + at % g.group;
            merge<T>(sums.data() + at, out.data() + at * g.value_dim, spans, step, g.value_dim, sink ? sink + head : nullptr,
                     to + ((row * g.nodes + node) * g.heads + head) * g.value_dim);
        }
    });
}

// See path_attention.py. query [batch, heads, nodes, dim], key and value [batch, kv_heads, tokens, dim] of one type, whose last
// dimension is contiguous; lengths [batch], depth [batch, nodes], path [batch, nodes, deep], first [batch, nodes] int64.
at::Tensor path_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& lengths,
                          const at::Tensor& depth, const at::Tensor& path, const std::optional<at::Tensor>& first,
                          const std::optional<at::Tensor>& sinks, double scale, double softcap) {
    const int64_t dim = query.size(3), value_dim = value.size(3), nodes = query.size(2);
    TORCH_CHECK(dim % LANES == 0 && value_dim % LANES == 0, "path_attention: dimensions ", dim, " and ", value_dim, " are no multiples of ", LANES);
    TORCH_CHECK(key.stride(3) == 1 && value.stride(3) == 1 && key.scalar_type() == query.scalar_type() && value.scalar_type() == query.scalar_type(),
                "path_attention: wrong keys or values");
    TORCH_CHECK(path.size(1) == nodes && lengths.is_contiguous() && depth.is_contiguous() && path.is_contiguous(), "path_attention: wrong tree");
    const Given given{query, key, value, lengths.const_data_ptr<int64_t>(), depth.const_data_ptr<int64_t>(), path.const_data_ptr<int64_t>(),
                      first ? first->const_data_ptr<int64_t>() : nullptr, query.size(0), query.size(1), key.size(1), nodes, dim,
                      value_dim, path.size(2), query.size(1) / key.size(1), (float)scale, (float)softcap};
    const int64_t batch = given.batch, deep = given.deep;
    TORCH_CHECK(key.size(0) == batch && value.size(0) == batch && key.size(1) == value.size(1) && key.size(2) == value.size(2) &&
                    key.size(3) == dim && given.heads % given.kv_heads == 0,
                "path_attention: queries, keys and values do not fit each other");
    TORCH_CHECK(lengths.numel() == batch && depth.numel() == batch * nodes && path.numel() == batch * nodes * deep,
                "path_attention: the tree does not fit the queries");
    TORCH_CHECK(!first || (first->is_contiguous() && first->numel() == batch * nodes), "path_attention: wrong first positions");
    TORCH_CHECK(!sinks || (sinks->is_contiguous() && sinks->numel() == given.heads), "path_attention: wrong sinks");
    for (int64_t i = 0; i < batch * nodes; i++) {
        TORCH_CHECK(given.depth[i] >= 0 && given.depth[i] < deep, "path_attention: depth ", given.depth[i], " of ", deep);
        for (int64_t d = 0; d <= given.depth[i]; d++)
            TORCH_CHECK(given.path[i * deep + d] >= 0 && given.path[i * deep + d] < nodes, "path_attention: node ", given.path[i * deep + d], " of ", nodes);
    }
    for (int64_t row = 0; row < batch; row++)
        TORCH_CHECK(given.lengths[row] >= 0 && given.lengths[row] + nodes <= key.size(2), "path_attention: ", given.lengths[row], " + ", nodes, " of ", key.size(2), " keys");
    at::Tensor result = at::empty({given.batch, nodes, given.heads, value_dim}, query.options());
    switch (query.scalar_type()) {
        case at::kFloat: attend<float>(given, sinks, result); break;
        case at::kBFloat16: attend<at::BFloat16>(given, sinks, result); break;
        case at::kHalf: attend<at::Half>(given, sinks, result); break;
        default: TORCH_CHECK(false, "path_attention: unknown type");
    }
    return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(medhead, library) {
    library.def("path_attention(Tensor query, Tensor key, Tensor value, Tensor lengths, Tensor depth, Tensor path, Tensor? first, "
                "Tensor? sinks, float scale, float softcap) -> Tensor");
}

TORCH_LIBRARY_IMPL(medhead, CPU, library) {
    library.impl("path_attention", path_attention);
}
