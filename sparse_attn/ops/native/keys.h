// Which keys a tile of queries reads, handed out in blocks of row pointers: the only place that walks block tables
// and selections.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace {

constexpr int kMaxHeadDim = 512;

// Stands in for the values of keys that no query of the tile sees: their memory may hold NaN, and 0 * NaN is NaN.
alignas(64) const float kZeroRow[kMaxHeadDim] = {};

template <class T>
struct KeyBlock {
    static constexpr int kCapacity = 512;
    int count = 0;
    const T* keys[kCapacity];
    const T* values[kCapacity];
    int32_t positions[kCapacity];  // ascending
};

// The keys of one selection row (or of a whole context) for one KV head, clipped to positions [low, high).
template <class T>
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
        keys_ = static_cast<const T*>(call.keys) + head;
        values_ = static_cast<const T*>(call.values) + head;
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
    void fill(KeyBlock<T>& block, int capacity) {
        int n = 0;
        while (n < capacity) {
            if (run_ >= run_end_ && !next_run()) break;
            const int64_t page = run_ / page_size_;
            const int offset = int(run_ - page * page_size_);
            const int64_t room = smaller<int64_t>(run_end_ - run_, page_size_ - offset);
            const int take = int(smaller<int64_t>(room, capacity - n));
            const int64_t at = table_[page] * page_stride_ + int64_t(offset) * dim_;
            const T* key = keys_ + at;
            const T* value = values_ + at;
            for (int i = 0; i < take; ++i) {
                block.keys[n + i] = key + int64_t(i) * dim_;
                block.values[n + i] = value + int64_t(i) * dim_;
                block.positions[n + i] = int32_t(run_ + i);
            }
            for (int i = 0; i < take && run_ + i < low_; ++i)
                block.values[n + i] = reinterpret_cast<const T*>(kZeroRow);
            n += take;
            run_ += take;
        }
        block.count = n;
    }

private:
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
    const T* keys_;
    const T* values_;
    const int32_t* unit_ = nullptr;
    const int32_t* unit_end_ = nullptr;
    int granularity_ = 0;
    int64_t run_, run_end_;
};

}  // namespace
