// Writing is bound by memory, so one instruction set serves all CPUs.
#include <cfloat>

#include "simd.h"
#include "write.h"

namespace {

constexpr int kMaxHeadDim = 512;
constexpr int kRun = 16;  // tokens of ``key_sum_16``

using V = Vec8;
using F = V::F;

FOVEATE_INLINE F absolute(F x) { return _mm256_andnot_ps(V::set(-0.0f), x); }

// The row's scale as in ``kv_cache/stored.py``: bit for bit the same.
template <class T>
float scale_of(const T* row, int dim) {
    F top = V::zero(), odd = V::zero();
    for (int d = 0; d < dim; d += V::W) {
        const F x = V::load(row + d);
        odd = _mm256_or_ps(odd, _mm256_cmp_ps(x, x, _CMP_UNORD_Q));
        top = V::max(top, absolute(x));
    }
    const float scale = V::highest(top) / 127.0f;
    if (_mm256_movemask_ps(odd) || !(scale <= FLT_MAX)) return __builtin_nanf("");
    return scale < FLT_MIN ? 0.0f : scale;
}

// Stores a row of integers; leaves in ``read`` what it will be read as.
template <class T>
void store_integers(const T* row, float scale, int dim, int8_t* target, float* read) {
    if (!(scale > 0.0f)) {
        for (int d = 0; d < dim; ++d) target[d] = 0, read[d] = scale;  // zeros, or NaN
        return;
    }
    const F step = V::set(scale);
    for (int d = 0; d < dim; d += V::W) {
        const __m256i near = _mm256_cvtps_epi32(V::div(V::load(row + d), step));  // to nearest even
        const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(near), _mm256_extracti128_si256(near, 1));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(target + d), _mm_packs_epi16(half, half));
        V::store(read + d, V::mul(_mm256_cvtepi32_ps(near), step));
    }
}

// min and max as torch has them: NaN wins, and stays.
FOVEATE_INLINE F lesser(F kept, F x) { return _mm256_blendv_ps(V::min(kept, x), kept, _mm256_cmp_ps(kept, kept, _CMP_UNORD_Q)); }
FOVEATE_INLINE F greater(F kept, F x) { return _mm256_blendv_ps(V::max(kept, x), kept, _mm256_cmp_ps(kept, kept, _CMP_UNORD_Q)); }

template <class Fold>
FOVEATE_INLINE void fold(float* kept, const float* row, int dim, bool first, float empty, Fold&& function) {
    if (!kept) return;
    for (int d = 0; d < dim; d += V::W)
        V::store(kept + d, function(first ? V::set(empty) : V::load(kept + d), V::load(row + d)));
}

// ``row`` to ``out``, which may be the same: halves are rotated in float32 and rounded once, the rest is kept.
template <class T>
void rotate_row(const foveate_write& call, int64_t token, const T* row, T* out) {
    const int half = call.rotary_dim / 2;
    const T* cos = static_cast<const T*>(call.cos) + token * call.rotary_dim;
    const T* sin = static_cast<const T*>(call.sin) + token * call.rotary_dim;
    for (int d = 0; d < half; d += V::W) {
        const F first = V::load(row + d), second = V::load(row + half + d);
        V::store(out + d, V::fmsub(first, V::load(cos + d), V::mul(second, V::load(sin + d))));
        V::store(out + half + d, V::fma(second, V::load(cos + half + d), V::mul(first, V::load(sin + half + d))));
    }
    if (out != row) __builtin_memcpy(out + 2 * half, row + 2 * half, size_t(call.head_dim - 2 * half) * sizeof(T));
}

template <class T>
void rotate_rows(const foveate_write& call, int head) {
    T* row = static_cast<T*>(call.query) + head * call.query_head_stride;
    for (int64_t t = 0; t < call.num_tokens; ++t, row += call.query_token_stride) rotate_row(call, t, row, row);
}

template <class T>
void write_rows(const foveate_write& call, int head, bool values) {
    const int dim = call.head_dim, size = call.page_size;
    const T* source = static_cast<const T*>(values ? call.value : call.key) +
                      head * (values ? call.value_head_stride : call.key_head_stride);
    const int64_t stride = values ? call.value_token_stride : call.key_token_stride;
    void* pages = values ? call.values : call.keys;
    float* scales = values ? call.value_scales : call.key_scales;
    float* sum = values ? call.value_sum : call.key_sum;
    float* low = values ? call.value_min : call.key_min;
    float* high = values ? call.value_max : call.key_max;
    float* runs = values ? nullptr : call.key_sum_16;
    const bool keeps = sum || low || high || runs;
    alignas(32) float read[kMaxHeadDim];
    alignas(32) T rotated[kMaxHeadDim];
    for (int64_t t = 0; t < call.num_tokens; ++t) {
        const int64_t slot = call.slots[t];
        if (slot < 0) continue;
        const int64_t at = slot / size * call.num_kv_heads + head;
        const int offset = int(slot % size);
        const int64_t place = at * size + offset;
        const T* row = source + t * stride;
        if (call.cos && !values) {
            rotate_row(call, t, row, rotated);
            row = rotated;
        }
        if (scales) {
            const float scale = scale_of(row, dim);
            scales[place] = scale;
            store_integers(row, scale, dim, static_cast<int8_t*>(pages) + place * dim, read);
        } else {
            __builtin_memcpy(static_cast<T*>(pages) + place * dim, row, size_t(dim) * sizeof(T));
            for (int d = 0; keeps && d < dim; d += V::W) V::store(read + d, V::load(row + d));
        }
        if (!keeps) continue;
        fold(sum ? sum + at * dim : nullptr, read, dim, offset == 0, 0.0f, V::add);
        fold(low ? low + at * dim : nullptr, read, dim, offset == 0, kInfinity, lesser);
        fold(high ? high + at * dim : nullptr, read, dim, offset == 0, -kInfinity, greater);
        fold(runs ? runs + place / kRun * dim : nullptr, read, dim, offset % kRun == 0, 0.0f, V::add);
    }
}

void write_head(const foveate_write& call, int head, bool values) {
    if (call.dtype == FOVEATE_FLOAT32) write_rows<float>(call, head, values);
    else write_rows<bfloat16>(call, head, values);
}

void rotate_head(const foveate_write& call, int head) {
    if (call.dtype == FOVEATE_FLOAT32) rotate_rows<float>(call, head);
    else rotate_rows<bfloat16>(call, head);
}

}  // namespace

constexpr WriteKernels kWriteAvx2 = {write_head, rotate_head};
