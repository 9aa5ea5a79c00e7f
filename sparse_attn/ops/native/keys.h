// Which keys a tile of queries reads, handed out in blocks of row pointers: the only place that walks block tables
// and selections.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

constexpr int kMaxHeadDim = 512;

// Stands in for the values of keys that no query of the tile sees: their memory may hold NaN, and 0 * NaN is NaN.
alignas(64) const float kZeroRow[kMaxHeadDim] = {};

// ``Row`` is the element type of K and V in their pages.
template <class Row>
struct KeyBlock {
    static constexpr int kCapacity = 512;
    static constexpr bool kScaled = false;
    int count = 0;
    const Row* keys[kCapacity];
    const Row* values[kCapacity];
    int32_t positions[kCapacity];  // ascending

    void load_scales() {}
    void prefetch_scales(int, int) const {}
};

// int8 counts in units of its row's scale. Where rows are multiplied as they are, the scale of a key goes to its logit,
// and that of a value to its weight. Scales lie elsewhere, so that they are fetched ahead as rows are: filling a block
// only notes where, and ``load_scales`` reads them when the block is due.
template <>
struct KeyBlock<int8_t> {
    static constexpr int kCapacity = 512;
    static constexpr bool kScaled = true;
    int count = 0;
    const int8_t* keys[kCapacity];
    const int8_t* values[kCapacity];
    int32_t positions[kCapacity];
    float key_scales[kCapacity];  // 0 behind the last key, up to a multiple of 16
    float value_scales[kCapacity];
    struct Run {  // keys side by side
        const float* key_scales;
        const float* value_scales;
        int32_t at, count;
    };
    Run runs[kCapacity];
    int num_runs = 0;
    int num_zeros = 0;  // first keys whose values are replaced by zeros

    void load_scales() {
        for (int i = 0; i < num_runs; ++i) {
            const Run& run = runs[i];
            if (run.count == 1) {
                key_scales[run.at] = *run.key_scales;
                value_scales[run.at] = *run.value_scales;
            } else {
                __builtin_memcpy(key_scales + run.at, run.key_scales, size_t(run.count) * 4);
                __builtin_memcpy(value_scales + run.at, run.value_scales, size_t(run.count) * 4);
            }
        }
        for (int i = 0; i < num_zeros; ++i) value_scales[i] = 0.0f;  // 0 * NaN would be NaN
        for (int i = count; i & 15; ++i) key_scales[i] = value_scales[i] = 0.0f;
    }

    // Of the runs that begin among the keys [first, last); calls ascend from 0.
    void prefetch_scales(int first, int last) const {
        if (first == 0) next_run_ = 0;
        for (; next_run_ < num_runs && runs[next_run_].at < last; ++next_run_)
            for (int i = 0; i < runs[next_run_].count; i += 16) {
                _mm_prefetch(reinterpret_cast<const char*>(runs[next_run_].key_scales + i), _MM_HINT_T0);
                _mm_prefetch(reinterpret_cast<const char*>(runs[next_run_].value_scales + i), _MM_HINT_T0);
            }
    }

private:
    mutable int next_run_ = 0;
};

// The keys of one selection row (or of a whole context) for one KV head, clipped to positions [low, high).
template <class Row>
class KeyCursor {
public:
    // ``exact``: hand out visible keys only. Otherwise runs of keys start at multiples of 16, so that 16 rows lie
    // side by side, and hidden keys among them have their values replaced by zeros.
    KeyCursor(const foveate_attention& call, int sequence, int kv_head, int64_t low, int64_t high, bool exact)
        : dim_(call.head_dim),
          page_size_(call.page_size),
          page_stride_(int64_t(call.num_kv_heads) * call.page_size * call.head_dim),
          low_(low),
          high_(high),
          exact_(exact),
          table_(call.block_tables + sequence * call.table_stride) {
        const int64_t head = int64_t(kv_head) * call.page_size * call.head_dim;
        keys_ = static_cast<const Row*>(call.keys) + head;
        values_ = static_cast<const Row*>(call.values) + head;
        if constexpr (kScaled) {
            key_scales_ = call.key_scales + int64_t(kv_head) * call.page_size;
            value_scales_ = call.value_scales + int64_t(kv_head) * call.page_size;
        }
        run_ = exact ? low : low & ~int64_t(15);
        run_end_ = high;
    }

    // Restricts the cursor to units ``[first, last)`` of a selection row.
    void select(const int32_t* units, int first, int last, int granularity) {
        unit_ = units + first;
        unit_end_ = units + last;
        granularity_ = granularity;
        run_ = run_end_ = 0;
    }

    // Fills a block with the next keys, ``capacity`` (a multiple of 16) at most.
    void fill(KeyBlock<Row>& block, int capacity) {
        int n = 0;
        if constexpr (kScaled) block.num_runs = block.num_zeros = 0;
        if (granularity_ == 1) {
            fill_tokens(block, capacity);
            return;
        }
        while (n < capacity) {
            if (run_ >= run_end_ && !next_run()) break;
            const int64_t page = run_ / page_size_;
            const int offset = int(run_ - page * page_size_);
            const int64_t room = smaller<int64_t>(run_end_ - run_, page_size_ - offset);
            const int take = int(smaller<int64_t>(room, capacity - n));
            const int64_t at = table_[page] * page_stride_ + int64_t(offset) * dim_;
            const Row* key = keys_ + at;
            const Row* value = values_ + at;
            for (int i = 0; i < take; ++i) {
                block.keys[n + i] = key + int64_t(i) * dim_;
                block.values[n + i] = value + int64_t(i) * dim_;
                block.positions[n + i] = int32_t(run_ + i);
            }
            if constexpr (kScaled) {
                const int64_t row = table_[page] * (page_stride_ / dim_) + offset;
                block.runs[block.num_runs++] = {key_scales_ + row, value_scales_ + row, n, take};
            }
            for (int i = 0; i < take && run_ + i < low_; ++i) {
                block.values[n + i] = reinterpret_cast<const Row*>(kZeroRow);
                if constexpr (kScaled) ++block.num_zeros;
            }
            n += take;
            run_ += take;
        }
        block.count = n;
    }

private:
    static constexpr bool kScaled = KeyBlock<Row>::kScaled;

    // Where units are single tokens, which as runs took as long to find as to multiply.
    void fill_tokens(KeyBlock<Row>& block, int capacity) {
        int n = 0;
        for (; n < capacity && unit_ < unit_end_; ++unit_) {
            const int32_t token = *unit_;
            if (token < 0 || token < low_ || token >= high_) continue;
            const uint32_t page = uint32_t(token) / uint32_t(page_size_);
            const uint32_t offset = uint32_t(token) - page * uint32_t(page_size_);
            const int64_t at = table_[page] * page_stride_ + int64_t(offset) * dim_;
            block.keys[n] = keys_ + at;
            block.values[n] = values_ + at;
            block.positions[n] = token;
            if constexpr (kScaled) {
                const int64_t row = table_[page] * (page_stride_ / dim_) + offset;
                block.runs[block.num_runs++] = {key_scales_ + row, value_scales_ + row, n, 1};
            }
            ++n;
        }
        block.count = n;
    }

    bool next_run() {
        while (unit_ < unit_end_) {
            const int64_t start = int64_t(*unit_++) * granularity_;
            if (start < 0) continue;
            run_end_ = smaller(start + granularity_, high_);
            if (run_end_ <= low_ || run_end_ <= start) continue;
            run_ = exact_ || granularity_ < 16 ? larger(start, low_) : start;
            return true;
        }
        run_ = run_end_ = 0;
        return false;
    }

    const int dim_;
    const int page_size_;
    const int64_t page_stride_;
    const int64_t low_, high_;
    const bool exact_;
    const int32_t* table_;
    const Row* keys_;
    const Row* values_;
    const float* key_scales_ = nullptr;
    const float* value_scales_ = nullptr;
    const int32_t* unit_ = nullptr;
    const int32_t* unit_end_ = nullptr;
    int granularity_ = 0;
    int64_t run_, run_end_;
};

}  // namespace
